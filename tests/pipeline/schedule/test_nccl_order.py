"""No program that `lower` makes hangs on NCCL, whatever waits for the device; and the simulator
that says so finds what does hang."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Program, lower, validate
from tests.pipeline.programs import Shape, parse, random_program, random_programs, shapes
from tests.pipeline.schedule import nccl_order
from tests.pipeline.schedule.nccl_order import (
    compute,
    everywhere,
    finishes,
    first_uses,
    lone_hangs,
    lower_ahead,
)

# --- The simulator ------------------------------------------------------------------------------

TOO_EARLY = parse("0RECV_B0 0F0 0SEND_F0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0")
"""0RECV_B0 is under way when 0F0 is enqueued, on which its tensor depends."""
OPPOSITE = parse(
    "0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0B0 0RECV_B1 0B1",
    "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
)
"""0RECV_B0 before 0F1, 1RECV_F1 before 1B0: each tensor is what the other rank computes next."""
LATE = parse(
    "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
    "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
)
"""Each rank sends the other something before it posts what the other sends."""


def full_channels(microbatches: int) -> Program:
    """Microbatches beyond the first three are sent when the gradients of those are, and received
    when all of that has been sent."""
    there = " ".join(f"0F{m} 0SEND_F{m}" for m in range(microbatches))
    back = " ".join(f"0RECV_B{m} 0B{m}" for m in range(microbatches))
    forwards = [f"1RECV_F{m} 1F{m}" for m in range(microbatches)]
    backwards = [f"1B{m} 1SEND_B{m}" for m in range(microbatches)]
    order = [*forwards[:3], *backwards[:3], *forwards[3:], *backwards[3:]]
    return parse(f"{there} {back}", " ".join(order))


def test_a_receive_that_is_posted_too_early_hangs_at_the_syncs_behind_it() -> None:
    """Until the SEND on which its tensor depends is enqueued."""
    assert lone_hangs(TOO_EARLY) == [(0, 1), (0, 2)]
    assert finishes(TOO_EARLY)
    assert not finishes(TOO_EARLY, [(0, 1)])
    assert finishes(TOO_EARLY, [(0, 0), (0, 3), (1, 1), (1, 2), (1, 4)])


def test_receives_of_two_ranks_hang_at_syncs_at_the_same_time_only() -> None:
    assert lone_hangs(OPPOSITE) == []
    assert not finishes(OPPOSITE, [(0, 3), (1, 3)])


def test_sends_that_are_received_late_hang_at_syncs_at_the_same_time_only() -> None:
    assert lone_hangs(LATE) == []
    assert not finishes(LATE, [(0, 4), (1, 4)])


def test_sends_beyond_those_under_way_hang_without_a_sync() -> None:
    """Two in each direction are under way; before a third, each rank would wait for the other."""
    assert finishes(full_channels(5))
    assert not finishes(full_channels(6))


def test_a_tensor_that_meets_another_receive_is_noticed() -> None:
    program = parse("0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F1 1RECV_F0 1F0 1F1")
    with pytest.raises(AssertionError, match="0SEND_F0 meets 1RECV_F1"):
        finishes(program)


@settings(max_examples=50)
@given(st.sampled_from([[0, 1], [0, 1, 0, 1], [0, 1, 2, 2, 1, 0]]), st.integers(0, 2**32))
def test_walking_through_a_program_is_to_try_each_place(placement: list[int], seed: int) -> None:
    ahead = lower_ahead(random_program(seed, placement, 2, split=False))
    tried = [place for place in everywhere(ahead) if not finishes(ahead, [place])]
    assert lone_hangs(ahead) == tried


# --- The rule -----------------------------------------------------------------------------------


@given(random_programs() | shapes(ranks=4).map(Shape.program), st.data())
def test_the_rule_is_that_no_syncs_can_hang_a_program(
    program: Program, data: st.DataObject
) -> None:
    """`validate` refuses a program with receives that were moved exactly if it hangs with syncs at
    all places, or without any. (With a lone sync, some that it refuses finish.)"""
    lowered = lower(program)
    for _ in range(data.draw(st.integers(1, 3))):
        actions = data.draw(st.sampled_from(lowered))
        moved = [index for index, action in enumerate(actions) if action.kind.receives]
        if moved:
            receive = actions.pop(data.draw(st.sampled_from(moved)))
            actions.insert(data.draw(st.integers(0, len(actions))), receive)
    try:
        validate(lowered)
    except ScheduleError as error:
        if "deadlocks" in str(error):
            assert not finishes(lowered, everywhere(lowered))
        return  # otherwise not in the order of the sends, or behind its use
    assert finishes(lowered)
    assert finishes(lowered, everywhere(lowered))
    assert not lone_hangs(lowered)


# --- The schedules ------------------------------------------------------------------------------

SMALL = list(nccl_order.shapes((2, 4)))
LARGE = [s for s in nccl_order.shapes((8,)) if s.microbatches < 10 and s.virtual < 3]


@pytest.mark.parametrize("name", sorted({shape.name for shape in SMALL}))
def test_no_schedule_hangs_wherever_ranks_wait_for_their_devices(name: str) -> None:
    for shape in SMALL + LARGE:
        if shape.name == name:
            program = lower(compute(shape))
            assert not lone_hangs(program), shape
            assert finishes(program, first_uses(program)), shape
            assert finishes(program, everywhere(program)), shape


@pytest.mark.parametrize("name", ["v-min", "v-half"])
@pytest.mark.parametrize("pipeline", [2, 4, 8])
def test_receives_ahead_of_what_they_depend_on_hang_when_kernels_are_loaded(
    name: str, pipeline: int
) -> None:
    for microbatches in (1, pipeline, 2 * pipeline + 1):
        ahead = lower_ahead(compute(Shape(name, pipeline, 2, microbatches)))
        assert not finishes(ahead, first_uses(ahead))
        assert lone_hangs(ahead)


@pytest.mark.parametrize("pipeline", [2, 4, 8])
def test_receives_ahead_hang_in_the_last_forwards_of_gpipe(pipeline: int) -> None:
    """On all ranks but the last, from the RECEIVE of the first gradient to the last forward."""
    ahead = lower_ahead(compute(Shape("gpipe", pipeline, 1, 2 * pipeline)))
    assert finishes(ahead, first_uses(ahead))
    hangs = lone_hangs(ahead)
    assert {rank for rank, _ in hangs} == set(range(pipeline - 1))
    for rank, index in hangs:
        row = list(map(str, ahead[rank]))
        assert row.index(f"{rank}RECV_B0") < index
        assert index <= row.index(f"{rank}SEND_F{2 * pipeline - 1}")


@pytest.mark.parametrize(
    "shape", [Shape("1f1b", 4, 1, 8), Shape("interleaved-1f1b", 4, 2, 8), Shape("zb-v", 4, 2, 8)]
)
def test_receives_ahead_hang_where_several_ranks_wait(shape: Shape) -> None:
    """Where no lone sync does: two neighbours that have posted what the other computes next."""
    ahead = lower_ahead(compute(shape))
    assert not lone_hangs(ahead)
    assert not finishes(ahead, everywhere(ahead))
    with pytest.raises(ScheduleError, match="post it after all actions"):
        validate(ahead)
