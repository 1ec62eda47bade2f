"""Each way in which a program can be wrong is refused with its reason, and no other program is."""

import random
import re
import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Action, Kind, Program, lower, simulate, validate
from megapipe.pipeline.schedule.action import stage_ranks
from tests.pipeline.programs import B, F, make, parse, programs, v_shaped
from tests.pipeline.schedule.reference import reference_times

# --- An oracle: carry out the program, all of it blocking, channels first in first out ----------


class Machine:
    """Ranks that take turns; every tensor is a name, so that a wrong one is noticed."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ranks = stage_ranks(program)
        self.posted: dict[tuple[int, int], list[Action]] = {}
        self.done: set[Action] = set()
        self.arrived: set[Action] = set()
        self.position = [0] * len(program)

    def finishes(self) -> bool:
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(self.program):
                while self.position[rank] < len(actions) and self.act(
                    rank, actions[self.position[rank]]
                ):
                    self.position[rank] += 1
                    moved = True
        return all(p == len(row) for p, row in zip(self.position, self.program, strict=True))

    def act(self, rank: int, action: Action) -> bool:
        """Whether the action could be done now; then it was."""
        stage, kind, microbatch, _ = action
        if kind.receives:
            posted = self.posted.setdefault((self.ranks[action.counterpart.stage], rank), [])
            if action not in self.arrived and action not in posted:
                posted.append(action)
            return action in self.arrived
        if kind.sends:
            queue = self.posted.get((rank, self.ranks[action.counterpart.stage]), [])
            if not queue or not self.computed(stage, microbatch, kind):
                return False
            if queue[0] != action.counterpart:
                return False  # the tensor would go to the wrong place: never done
            self.arrived.add(queue.pop(0))
            return True
        if not self.inputs_there(action):
            return False
        self.done.add(action)
        return True

    def computed(self, stage: int, microbatch: int, kind: Kind) -> bool:
        forward = kind is Kind.SEND_FORWARD
        kinds = [Kind.FORWARD] if forward else [Kind.BACKWARD, Kind.BACKWARD_INPUT]
        return any(Action(stage, kind, microbatch) in self.done for kind in kinds)

    def inputs_there(self, action: Action) -> bool:
        stage, kind, microbatch, _ = action
        if kind is Kind.BACKWARD_WEIGHT:
            return Action(stage, Kind.BACKWARD_INPUT, microbatch) in self.done
        if kind is Kind.FORWARD:
            neighbour, receive, send = stage - 1, Kind.RECEIVE_FORWARD, Kind.SEND_FORWARD
        else:
            if Action(stage, Kind.FORWARD, microbatch) not in self.done:
                return False
            neighbour, receive, send = stage + 1, Kind.RECEIVE_BACKWARD, Kind.SEND_BACKWARD
        if neighbour not in self.ranks:
            return True
        if self.ranks[neighbour] != self.ranks[stage]:
            return Action(stage, receive, microbatch) in self.arrived
        return self.computed(neighbour, microbatch, send)


def refused(program: Program) -> bool:
    try:
        validate(program)
    except ScheduleError:
        return True
    return False


@given(programs, st.data())
def test_moved_actions_are_refused_exactly_if_the_program_would_not_finish(
    program: Program, data: st.DataObject
) -> None:
    lowered = lower(program)
    for _ in range(data.draw(st.integers(1, 3))):
        actions = data.draw(st.sampled_from(lowered))
        index = data.draw(st.integers(0, len(actions) - 1))
        actions.insert(data.draw(st.integers(0, len(actions) - 1)), actions.pop(index))
    assert refused(lowered) == (not Machine(lowered).finishes())


@given(programs, st.data())
def test_swapped_actions_are_refused_exactly_if_the_program_would_not_finish(
    program: Program, data: st.DataObject
) -> None:
    lowered = lower(program)
    actions = data.draw(st.sampled_from(lowered))
    a, b = data.draw(st.lists(st.integers(0, len(actions) - 1), min_size=2, max_size=2))
    actions[a], actions[b] = actions[b], actions[a]
    assert refused(lowered) == (not Machine(lowered).finishes())


@given(programs, st.data())
def test_a_doubled_action_is_named(program: Program, data: st.DataObject) -> None:
    lowered = lower(program)
    actions = data.draw(st.sampled_from(lowered))
    index = data.draw(st.integers(0, len(actions) - 1))
    actions.insert(data.draw(st.integers(index + 1, len(actions))), actions[index])
    with pytest.raises(
        ScheduleError, match=f"^{actions[index]} is done twice: as action {index} of"
    ):
        validate(lowered)


@given(programs, st.data())
def test_a_dropped_action_is_named(program: Program, data: st.DataObject) -> None:
    """Whichever it is, except where what is left is a program of another kind: of fewer
    microbatches, without communication, or without backwards."""
    lowered = lower(program)
    actions = data.draw(st.sampled_from(lowered))
    action = actions.pop(data.draw(st.integers(0, len(actions) - 1)))
    left = [a for row in lowered for a in row]
    assume(any(a.kind is action.kind and a.stage == action.stage for a in left))
    assume(any(a.microbatch >= action.microbatch for a in left))
    with pytest.raises(ScheduleError, match=rf"^{action} is missing: rank \d+ must do it"):
        validate(lowered)


@given(programs, st.data())
def test_an_action_on_another_rank_is_refused(program: Program, data: st.DataObject) -> None:
    assume(len(program) > 1)
    lowered = lower(program)
    source, destination = data.draw(st.permutations(range(len(lowered))))[:2]
    action = lowered[source].pop(data.draw(st.integers(0, len(lowered[source]) - 1)))
    assume(any(a.stage == action.stage and a.kind.computes for a in lowered[source]))
    lowered[destination].insert(data.draw(st.integers(0, len(lowered[destination]))), action)
    with pytest.raises(ScheduleError, match=r"belongs on rank|is computed on rank|one too many"):
        validate(lowered)


# --- The reasons --------------------------------------------------------------------------------


def test_the_cycle_of_a_deadlock_is_shown() -> None:
    program = parse(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
    )
    with pytest.raises(ScheduleError) as caught:
        validate(program)
    assert str(caught.value) == (
        "the program deadlocks:\n"
        "  rank 0 waits in 0SEND_F1 (action 3) for 1RECV_F1 (action 4 of rank 1)\n"
        "  rank 1 waits in 1SEND_B0 (action 3) for 0RECV_B0 (action 4 of rank 0)"
    )
    early = program[1].pop(4)  # the receive one action earlier, and it finishes
    validate([program[0], [*program[1][:2], early, *program[1][2:]]])


def test_a_receive_that_waits_for_a_later_action_of_its_rank_is_refused() -> None:
    program = parse(
        "0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    )
    with pytest.raises(ScheduleError) as caught:
        validate(program)
    assert str(caught.value) == (
        "the program deadlocks:\n"
        "  rank 0 waits in 0RECV_B0 (action 2) for 1SEND_B0 (action 4 of rank 1)\n"
        "  rank 1 waits in 1RECV_F1 (action 2) for 0SEND_F1 (action 4 of rank 0)\n"
        "A RECEIVE waits there for its tensor, as it does on a GPU when something waits for the "
        "whole device: post it after all actions of its rank that the tensor depends on."
    )
    early = program[0].pop(2)
    validate([[*program[0][:4], early, *program[0][4:]], program[1]])


def test_a_rank_that_only_waits_for_the_cycle_is_left_out() -> None:
    program = parse("0F0 0B0", "1F0 1B0", "2F1 2F0 2B0 2B1", "3F0 3F1 3B0 3B1", "0F1 0B1")
    program[0] += program.pop()
    program[1] += parse("1F1 1B1")[0]
    with pytest.raises(ScheduleError) as caught:
        lower(program)
    assert re.findall(r"rank (\d) waits in (\w+)", str(caught.value)) == [
        ("1", "1B0"),
        ("2", "2F1"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F1 1RECV_F0 1F0 1F1"],
            "rank 1 posts 1RECV_F1 where rank 0 sends 0SEND_F0: receives must be in the order",
        ),
        (["0F0 0SEND_F0", "1RECV_F0 1F0 1B0"], "0B0 is missing: rank 0 must do it"),
        (["0F0 0F1 0SEND_F1 0SEND_F0", "1RECV_F0 1F0 1F1"], "1RECV_F1 is missing"),
        (["0F0 0SEND_F0", "1F0 1RECV_F0"], "1F0 .* needs 1RECV_F0, which comes later on the same"),
        (["0SEND_F0 0F0", "1RECV_F0 1F0"], "0SEND_F0 .* needs 0F0, which comes later on the same"),
        (["0B0 0F0"], "0B0 .action 0 of rank 0. needs 0F0, which comes later on the same rank"),
        (["0F0 1B0 1F0 0B0"], "1B0 .* needs 1F0, which comes later"),
        (["0F0 0W0 0I0"], "0W0 .* needs 0I0, which comes later"),
        (["0F0 0I0"], "0W0 is missing"),
        (["0F0 0I0 0W0 0B0"], "0B0 .* is one too many: the stage has the input gradient"),
        (["0F0 0F0"], "0F0 is done twice: as action 0 of rank 0 and as action 1 of rank 0"),
        (["0F0 1F0 0SEND_F0 1RECV_F0"], "0SEND_F0 .* is one too many: no tensor of this kind"),
        (["0F0 0SEND_F0 1RECV_F0", "1F0"], r"1RECV_F0 \(action 2 of rank 0\) belongs on rank 1"),
        (["0F0", "1F0"], "has no communication: pass it through `lower` first"),
        (["0F0 1F1", "1F0"], "stage 1 is computed on rank 0 and, by 1F0, on rank 1"),
        (["0F0 0F2"], "0F1 is missing: rank 0 must do it, as every stage computes 3 microbatches"),
        (
            ["0F0 0SEND_F0", "2F0 2RECV_F0", "1RECV_F0 1F0 1SEND_F0", "3F0"],
            "stages 0 and 1 lie on ranks 0 and 2, which are not neighbours",
        ),
    ],
)
def test_the_reason_is_given(rows: list[str], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(parse(*rows))


def test_programs_of_the_other_kinds_pass() -> None:
    validate(lower(v_shaped(4)))
    validate(lower(make("forward", 3, 2, 4)))
    validate([[]])


@example(make("interleaved-1f1b", 2, 2, 4))
@given(programs)
def test_validation_changes_nothing(program: Program) -> None:
    lowered = lower(program)
    copy = [list(actions) for actions in lowered]
    validate(lowered)
    assert lowered == copy


# --- Speed ---------------------------------------------------------------------------------------


class Counted(int):
    """A microbatch that is compared by a line of Python, so that searches in C count as well."""

    def __eq__(self, other: object) -> bool:
        return int.__eq__(self, other)

    __hash__ = int.__hash__


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of Python it takes, counted again in every turn of a loop."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def lines_per_action(pipeline: int, microbatches: int) -> tuple[float, float]:
    """Of `lower` and of `validate`."""
    program = [
        [action._replace(microbatch=Counted(action.microbatch)) for action in actions]
        for actions in make("1f1b", pipeline, 1, microbatches)
    ]
    lowered = lower(program)
    count = sum(map(len, lowered))
    return lines_run(lambda: lower(program)) / count, lines_run(lambda: validate(lowered)) / count


@pytest.mark.parametrize(("pipeline", "microbatches"), [(16, 128), (64, 32)])
def test_work_per_action_stays_the_same_in_larger_programs(
    pipeline: int, microbatches: int
) -> None:
    """Four times the microbatches, or the stages: a search through all actions for each of them
    would be four times the work per action."""
    few, many = lines_per_action(16, 32), lines_per_action(pipeline, microbatches)
    for before, after in zip(few, many, strict=True):
        assert after <= 1.05 * before


# --- Cycles and memory ---------------------------------------------------------------------------

WAITS = re.compile(
    r"  rank (\d+) waits in (\w+) \(action (\d+)\) for (\w+) \(action (\d+) of rank (\d+)\)"
)


def drawn_rank_by_rank(seed: int, placement: list[int], microbatches: int) -> Program:
    """Orders in which each rank is right by itself: what it computes itself comes in time. What
    comes from others may close a cycle."""
    draw = random.Random(seed)
    program: Program = [[] for _ in range(max(placement) + 1)]
    last = len(placement) - 1
    todo = [
        Action(s, kind, m) for s in range(last + 1) for kind in (F, B) for m in range(microbatches)
    ]
    while todo:
        action = todo.pop(draw.randrange(len(todo)))
        stage, kind, microbatch, _ = action
        own = program[placement[stage]]
        needs = [Action(stage - 1, F, microbatch)] if kind is F else [Action(stage, F, microbatch)]
        if kind is B and stage < last:
            needs.append(Action(stage + 1, B, microbatch))
        here = [n for n in needs if n.stage >= 0 and placement[n.stage] == placement[stage]]
        (own if all(need in own for need in here) else todo).append(action)
    return program


@given(
    st.integers(0, 2**32),
    st.sampled_from([[0, 1], [0, 1, 2], [0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 2, 2, 1, 0]]),
    st.integers(1, 3),
)
def test_a_program_is_refused_for_a_cycle_exactly_if_it_has_one(
    seed: int, placement: list[int], microbatches: int
) -> None:
    """In the message each rank waits for what the next has not come to, the last for the first."""
    program = drawn_rank_by_rank(seed, placement, microbatches)
    if reference_times(program, lambda action: 1.0, 0.0) is not None:
        validate(lower(program))
        return
    with pytest.raises(ScheduleError) as caught:
        lower(program)
    first, *lines = str(caught.value).splitlines()
    assert first == "the program deadlocks:"
    cycle = [match.groups() for match in map(WAITS.fullmatch, lines) if match is not None]
    assert len(cycle) == len(lines) >= 2
    stands = {rank: int(index) for rank, _, index, *_ in cycle}
    for waits, following in zip(cycle, cycle[1:] + cycle[:1], strict=True):
        rank, action, index, need, needed_index, other = waits
        assert str(program[int(rank)][int(index)]) == action
        assert str(program[int(other)][int(needed_index)]) == need
        assert other == following[0]
        assert int(needed_index) >= stands[other]


@given(programs)
def test_the_memory_bound_is_exact(program: Program) -> None:
    lowered = lower(program)
    peaks = simulate(lowered).peak_live
    validate(lowered, max_live=max(peaks))
    too_much = rf"makes {max(peaks)} activations live on the rank, .*; {max(peaks) - 1} are allowed"
    with pytest.raises(ScheduleError, match=too_much) as caught:
        validate(lowered, max_live=max(peaks) - 1)
    match = re.match(r"(\w+) \(action (\d+) of rank (\d+)\)", str(caught.value))
    assert match is not None
    action, index, rank = match.groups()
    row = lowered[int(rank)]
    assert str(row[int(index)]) == action
    assert peaks[int(rank)] == max(peaks)
    forwards = sum(a.kind is Kind.FORWARD for a in row[: int(index) + 1])
    assert forwards >= max(peaks)


def test_a_bound_between_two_numbers() -> None:
    lowered = lower(make("1f1b", 4, 1, 8))
    validate(lowered, max_live=4.5)
    with pytest.raises(ScheduleError, match=r"^0F3 .* of rank 0\) makes 4 .*; 3\.5 are allowed"):
        validate(lowered, max_live=3.5)
