"""Values and errors between ranks: over a whole world, a part of it, and in a process alone."""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from megapipe.distributed.rank_group import ALONE, RankGroup, first_to_report
from megapipe.errors import CheckpointError, ConfigError, DataError, MegapipeError, ScheduleError
from tests.ranks import run_ranks

# --- Values --------------------------------------------------------------------------------------


def value_of(rank: int) -> dict[str, Any]:
    return {"rank": rank, "text": "ä" * 1000 * rank, "big": 2**100 + rank, "nothing": None}


def exchange() -> tuple[list[Any], list[Any] | None, Any, Any]:
    world = RankGroup.of(dist.group.WORLD)
    pair = dist.new_group([0, 2])
    if world.rank != 1:
        ranks = RankGroup.of(pair)
        assert (ranks.rank, ranks.size) == (world.rank // 2, 2)
        assert ranks.all_gather(world.rank) == [0, 2]
        assert ranks.from_first(lambda: ["from", world.rank]) == ["from", 0]
    return (
        world.all_gather(value_of(world.rank)),
        world.gather(value_of(world.rank)),
        world.from_first(lambda: value_of(world.rank + 1)),
        world.on_first(lambda: {world.rank}),
    )


def test_values_of_any_length_arrive_in_rank_order() -> None:
    everyone = [value_of(rank) for rank in range(3)]
    gathered, at_first, from_first, on_first = zip(*run_ranks(exchange, 3), strict=True)
    assert list(gathered) == [everyone] * 3
    assert list(at_first) == [everyone, None, None]
    assert list(from_first) == [value_of(1)] * 3
    assert list(on_first) == [{0}, None, None], "the result stays there, and need not be JSON"


ODD = {1: (math.nan, -math.inf)}


def gather_odd_values() -> list[Any]:
    return RankGroup.of(dist.group.WORLD).all_gather(ODD)


def test_values_arrive_alike_in_one_process_and_in_several() -> None:
    arrived = {"1": [math.nan, -math.inf]}
    assert repr(ALONE.all_gather(ODD)) == repr([arrived])
    assert repr(run_ranks(gather_odd_values, 2)) == repr([[arrived] * 2] * 2)


def test_a_process_alone_needs_no_group() -> None:
    assert RankGroup.of(None) is ALONE
    assert ALONE.is_first
    assert ALONE.all_gather({"a": (1,)}) == ALONE.gather({"a": (1,)}) == [{"a": [1]}]
    assert ALONE.from_first(lambda: (3,)) == [3]
    assert ALONE.on_first(lambda: (3,)) == (3,)
    assert ALONE.in_agreement(lambda: 2, what="add", share=lambda value: 10 * value) == (2, [20])
    with pytest.raises(MegapipeError, match=r"^cannot add: a/b: No such file or directory\.$"):
        ALONE.in_agreement(lambda: open("a/b"), what="cannot add")  # noqa: SIM115
    with pytest.raises(ZeroDivisionError):
        ALONE.from_first(lambda: 1 // 0)


# --- Errors --------------------------------------------------------------------------------------


def said_by(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "well"


def agree(errors: dict[int, Exception], what: str | None) -> str:
    """Act in agreement where the ranks of `errors` fail; then once more, to show that the ranks
    are still in step."""
    ranks = RankGroup.of(dist.group.WORLD)

    def act() -> int:
        if ranks.rank in errors:
            raise errors[ranks.rank]
        return ranks.rank

    said = said_by(lambda: ranks.in_agreement(act, what=what))
    own, shared = ranks.in_agreement(lambda: ranks.rank, share=lambda value: 10 * value)
    assert (own, shared) == (ranks.rank, [10 * rank for rank in range(ranks.size)])
    return said


FULL = OSError(28, "No space left on device", "a")


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({}, "well"),
        ({1: DataError("the reason")}, "DataError: cannot add: rank 1: the reason"),
        ({2: CheckpointError("gone")}, "CheckpointError: cannot add: rank 2: gone"),
        ({1: FULL}, "MegapipeError: cannot add: rank 1: a: No space left on device."),
        (
            {0: ScheduleError("the first"), 1: DataError("another")},
            "ScheduleError: cannot add: rank 0: the first (and 1 more rank)",
        ),
        (
            {rank: DataError(str(rank)) for rank in range(3)},
            "DataError: cannot add: rank 0: 0 (and 2 more ranks)",
        ),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all_and_keeps_its_kind(
    errors: dict[int, Exception], said: str
) -> None:
    assert run_ranks(agree, 3, errors, "cannot add") == [said] * 3


def test_without_more_words_an_error_has_its_own_text() -> None:
    errors = {1: DataError("row 7: malformed"), 2: DataError("row 9: malformed")}
    assert run_ranks(agree, 3, errors, None) == ["DataError: row 7: malformed"] * 3


def test_a_fault_of_the_program_is_raised_as_itself_where_it_happened() -> None:
    """Also where another rank has failed by a fault of the user's, which may follow from it."""
    others = "ConnectionError: rank 1 has failed: ValueError('the reason')"
    errors = {0: DataError("no text"), 1: ValueError("the reason")}
    answers = run_ranks(agree, 3, errors, "cannot add")
    assert answers == [others, "ValueError: the reason", others]


def fail_first(error: Exception) -> tuple[str, str, list[Any]]:
    ranks = RankGroup.of(dist.group.WORLD)

    def act() -> NoReturn:
        raise error

    return (
        said_by(lambda: ranks.from_first(act)),
        said_by(lambda: ranks.on_first(act, "cannot add")),
        ranks.all_gather(ranks.rank),
    )


@pytest.mark.parametrize(
    ("error", "first", "second"),
    [
        (ValueError("a"), "ValueError: {}a", "ConnectionError: rank 0 has failed: ValueError('a')"),
        (OSError(5, "Input/output error", "a"), *["MegapipeError: {}a: Input/output error."] * 2),
        (CheckpointError("damaged"), *["CheckpointError: {}damaged"] * 2),
    ],
)
def test_an_error_of_the_first_rank_leaves_none_waiting(
    error: Exception, first: str, second: str
) -> None:
    prefix = "" if isinstance(error, ValueError) else "cannot add: rank 0: "
    expected = [(said.format(""), said.format(prefix), [0, 1]) for said in (first, second)]
    assert run_ranks(fail_first, 2, error) == expected


class DerivedError(ScheduleError):
    """Of a module above the floor of rank groups."""


def raise_with_notes(kind: str) -> list[tuple[type[Exception], object, list[str]]]:
    """(kind, problems or text, notes) on every rank, for an error of rank 1."""
    ranks = RankGroup.of(dist.group.WORLD)

    def act() -> None:
        if ranks.rank == 1:
            error: Exception = DerivedError("no room")
            if kind == "config":
                error = ConfigError(["model.a: too small", "model.b: too large"])
            error.add_note("in line 3")
            raise error

    with pytest.raises(MegapipeError) as caught:
        ranks.in_agreement(act)
    error = caught.value
    said = error.problems if isinstance(error, ConfigError) else str(error)
    return [(type(error), said, error.notes)]


def test_all_ranks_raise_one_kind_with_its_problems_and_notes() -> None:
    """An `except` then takes all ranks the same way."""
    assert (
        run_ranks(raise_with_notes, 2, "config")
        == [[(ConfigError, ["model.a: too small", "model.b: too large"], ["in line 3"])]] * 2
    )
    assert (
        run_ranks(raise_with_notes, 2, "derived")
        == [[(ScheduleError, "no room", ["in line 3"])]] * 2
    )


def share_what_is_not_json() -> list[str]:
    ranks = RankGroup.of(dist.group.WORLD)
    value = {0} if ranks.rank == 1 else 0
    first = {0} if ranks.is_first else 0
    return [
        said_by(lambda: ranks.all_gather(value)),
        said_by(lambda: ranks.from_first(lambda: first)),
        said_by(lambda: ranks.gather(value)),
    ]


def test_a_value_that_can_not_be_sent_leaves_none_waiting() -> None:
    error = "TypeError: Object of type set is not JSON serializable"
    others = "ConnectionError: rank {} has failed: TypeError('Object of type set is not JSON serial"
    first, second = run_ranks(share_what_is_not_json, 2)
    assert first[0].startswith(others.format(1))
    assert first[1] == error
    assert second[0] == error
    assert second[1].startswith(others.format(0))
    assert first[2].startswith(others.format(1))
    assert second[2] == error


def fail_in_pairs() -> list[str]:
    """Ranks 1 and 3 are a group, in which 3 has the number 1."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    ranks = RankGroup.of(groups[rank % 2])

    def act(error: Exception) -> None:
        if rank == 3:
            raise error

    return [
        said_by(lambda: ranks.in_agreement(lambda: act(DataError("a")), what="cannot add")),
        said_by(lambda: ranks.in_agreement(lambda: act(ValueError("b")), what="cannot add")),
    ]


def test_ranks_are_named_by_their_number_in_the_world() -> None:
    answers = run_ranks(fail_in_pairs, 4)
    assert answers[0] == answers[2] == ["well", "well"]
    said = "DataError: cannot add: rank 3: a"
    assert answers[1] == [said, "ConnectionError: rank 3 has failed: ValueError('b')"]
    assert answers[3] == [said, "ValueError: b"]


def find_shared(errors: dict[int, Exception]) -> str:
    ranks = RankGroup.of(dist.group.WORLD)
    error = ranks.shared_error(errors.get(ranks.rank))
    return f"{type(error).__name__}: {error}"


def test_an_error_that_is_kept_for_later_is_shared() -> None:
    assert run_ranks(find_shared, 2, {}) == ["NoneType: None"] * 2
    assert run_ranks(find_shared, 2, {1: DataError("a")}) == ["DataError: a"] * 2
    others = "ConnectionError: rank 1 has failed: KeyError('a')"
    assert run_ranks(find_shared, 2, {1: KeyError("a")}) == [others, "KeyError: 'a'"]


# --- What one of many prints ---------------------------------------------------------------------


def report() -> list[bool]:
    store = dist.distributed_c10d._get_default_store()
    return [first_to_report(store, text) for text in ("known to all", f"of {dist.get_rank()}")]


def test_what_many_ranks_know_is_printed_by_one() -> None:
    answers = run_ranks(report, 3)
    assert sum(known for known, _ in answers) == 1
    assert all(own for _, own in answers)
