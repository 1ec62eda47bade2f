"""Failures that reach everyone."""

import pytest
import torch.distributed as dist

from megapipe.checkpoint.exchange import Peers
from megapipe.errors import CheckpointError, DataError
from tests.ranks import run_ranks


def fail_on(failing: list[int], kind: type[Exception]) -> str:
    peers = Peers(dist.get_rank(), dist.get_world_size())

    def action() -> int:
        if peers.rank in failing:
            raise kind("the reason")
        return peers.rank

    try:
        own, shared = peers.together(action, "cannot do it", share=lambda value: 10 * value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert own == peers.rank
    assert shared == [0, 10]
    assert peers.from_first(lambda: ["from", peers.rank], "cannot do it") == ["from", 0]
    return "well"


def test_a_failure_on_one_rank_is_raised_on_all() -> None:
    assert run_ranks(fail_on, 2, [], DataError) == ["well"] * 2
    one = "CheckpointError: cannot do it: rank 1: the reason"
    assert run_ranks(fail_on, 2, [1], DataError) == [one] * 2
    assert run_ranks(fail_on, 2, [1], OSError) == [one] * 2
    both = "CheckpointError: cannot do it: rank 0: the reason (and 1 more ranks)"
    assert run_ranks(fail_on, 2, [0, 1], DataError) == [both] * 2


def test_a_bug_keeps_its_type_where_it_happened() -> None:
    assert run_ranks(fail_on, 2, [1], ValueError) == [
        "CheckpointError: cannot do it: rank 1: ValueError: the reason",
        "ValueError: the reason",
    ]


def test_one_process_needs_no_group() -> None:
    peers = Peers()
    assert peers.gather({"a": 1}) == [{"a": 1}]
    assert peers.from_first(lambda: 3, "cannot") == 3
    with pytest.raises(CheckpointError, match=r"^cannot: no such file or directory \(a/b\)$"):
        peers.together(lambda: open("a/b"), "cannot")  # noqa: SIM115
