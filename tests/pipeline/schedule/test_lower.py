from itertools import pairwise

import pytest
from hypothesis import given

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Costs, Kind, Program, lower, simulate, validate
from megapipe.pipeline.schedule.action import compute_only, sequential, stage_ranks
from tests.pipeline.programs import Shape, make, parse, programs, shapes, v_shaped


@given(programs)
def test_every_legal_program_is_lowered_to_one_without_deadlock(program: Program) -> None:
    lowered = lower(program)
    validate(lowered)
    assert compute_only(lowered) == sequential(program), "the order of computation stays"


@given(programs)
def test_communication_costs_no_time_beyond_the_latency(program: Program) -> None:
    """Every receive is posted in time: the lowered program is as fast as the one without."""
    before, after = simulate(program), simulate(lower(program))
    assert after.makespan == before.makespan
    assert after.peak_live == before.peak_live


@given(programs)
def test_no_send_waits_for_its_receive(program: Program) -> None:
    timeline = simulate(lower(program))
    at = {span.action: span.begin for spans in timeline.spans for span in spans}
    for action, sent in at.items():
        if action.kind.sends:
            assert at[action.counterpart] <= sent


@given(programs)
def test_receives_stand_where_their_rank_is_when_the_tensor_is_sent(program: Program) -> None:
    """Behind its actions that have ended by then, before those that have not."""
    lowered = lower(program)
    ends = {span.action: span.end for spans in simulate(lowered).spans for span in spans}
    for actions in lowered:
        for index, receive in enumerate(actions):
            if receive.kind.receives:
                sent = ends[receive.counterpart]
                assert all(ends[a] <= sent for a in actions[:index] if a.kind.computes)
                assert all(ends[a] >= sent for a in actions[index:] if a.kind.computes)


@given(programs)
def test_sends_follow_their_action(program: Program) -> None:
    for actions in lower(program):
        for before, action in pairwise(actions):
            if action.kind.sends:
                assert (before.stage, before.microbatch) == (action.stage, action.microbatch)
                assert before.kind.computes


@pytest.mark.parametrize("latency", [2**-20, 1 / 64, 1 / 16, 1 / 4, 1 / 2])
@given(shape=shapes(ranks=8))
def test_no_schedule_is_slower_for_when_its_receives_are_posted(
    latency: float, shape: Shape
) -> None:
    """Equal stages, and a latency in forwards of a chunk."""
    program, costs = shape.program(), Costs(latency=latency)
    assert simulate(lower(program), costs).makespan == simulate(program, costs).makespan


def test_lowered_1f1b_in_full() -> None:
    assert lower(make("1f1b", 2, 1, 3)) == parse(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0F2 0SEND_F2 0B1 0RECV_B2 0B2",
        "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1 1RECV_F2 1F2 1B2 1SEND_B2",
    )


def test_a_lowered_v_in_full() -> None:
    """Stages 0 1 2 3 on ranks 0 1 1 0: between 1 and 2 nothing is sent."""
    assert lower(make("zb-v", 2, 2, 2)) == parse(
        "0F0 0SEND_F0 0F1 0SEND_F1 3RECV_F0 3F0 3RECV_F1 3I0 3SEND_B0 3W0 3F1 3I1 3SEND_B1 "
        "0RECV_B0 3W1 0I0 0W0 0RECV_B1 0I1 0W1",
        "1RECV_F0 1RECV_F1 1F0 2F0 2SEND_F0 1F1 2F1 2SEND_F1 2RECV_B0 2I0 2W0 2RECV_B1 "
        "1I0 1SEND_B0 1W0 2I1 2W1 1I1 1SEND_B1 1W1",
    )


def test_stages_on_one_rank_need_no_communication() -> None:
    program = make("interleaved-1f1b", 1, 4, 3)
    assert lower(program) == program
    lowered = lower(v_shaped(3))
    assert stage_ranks(lowered) == {0: 0, 1: 1, 2: 1, 3: 0}
    ends = {(a.kind, a.stage) for actions in lowered for a in actions if a.kind.sends}
    assert ends == {
        (Kind.SEND_FORWARD, 0),
        (Kind.SEND_FORWARD, 2),
        (Kind.SEND_BACKWARD, 3),
        (Kind.SEND_BACKWARD, 1),
    }


def test_an_order_that_can_never_finish_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"rank 0 waits in 2F0 .* for 1F0 "):
        lower(parse("0F0 2F0 0F1 2F1", "1F1 1F0"))


def test_lowering_twice_is_a_programmer_error() -> None:
    with pytest.raises(AssertionError, match="lowered before"):
        lower(lower(make("1f1b", 2, 1, 2)))
