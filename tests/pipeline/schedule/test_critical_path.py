"""The chain of actions that makes a timeline as long as it is."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Costs, Program, Span, Timeline, lower, simulate
from megapipe.pipeline.schedule.action import stage_ranks
from megapipe.pipeline.schedule.critical_path import Reason, critical_path
from tests.pipeline.programs import make, parse, programs
from tests.pipeline.schedule.test_simulate import costs_for


def steps(program: Program, costs: Costs) -> list[str]:
    path = critical_path(simulate(program, costs), costs.latency)
    return [f"{step.span.action} {step.reason}" for step in path]


def test_small_paths_in_full() -> None:
    program = parse("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1")
    there_and_back = [
        *("0F0 start", "1F0 transfer", "1B0 dependency", "1F1 same rank", "1B1 dependency"),
        "0B1 transfer",
    ]
    for latency in (0.0, 0.5):
        assert steps(program, Costs(latency=latency)) == there_and_back
        assert steps(lower(program), Costs(latency=latency)) == there_and_back
    slow_first = Costs(forward=[9.0, 1.0])
    assert steps(program, slow_first) == [
        *("0F0 start", "0F1 same rank", "1F1 transfer", "1B1 dependency", "0B1 transfer"),
    ]


def test_uses_within_a_rank() -> None:
    program = parse("0F0 1F0 1I0 0I0 1W0 0W0")
    assert steps(program, Costs()) == [
        *("0F0 start", "1F0 dependency", "1I0 dependency", "0I0 dependency"),
        *("1W0 same rank", "0W0 same rank"),
    ]


def test_a_late_receive_is_what_delays() -> None:
    """Rank 1 posts the second receive after 1F0: that, and not 0F1, delays 1F1."""
    late = parse("0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1F0 1RECV_F1 1F1")
    path = critical_path(simulate(late, Costs(latency=1.0)), 1.0)
    assert [f"{step.rank} {step.span.action} {step.reason}" for step in path] == [
        *("0 0F0 start", "1 1F0 transfer", "1 1F1 transfer"),
    ]


@settings(max_examples=60)
@given(programs, st.booleans(), st.data())
def test_the_path_fills_the_makespan(program: Program, lowered: bool, data: st.DataObject) -> None:
    costs = data.draw(costs_for(len(stage_ranks(program))))
    timeline = simulate(lower(program) if lowered else program, costs)
    path = critical_path(timeline, costs.latency)
    assert (path[0].span.begin, path[0].reason) == (0.0, Reason.START)
    assert path[-1].span.end == timeline.makespan
    for before, step in pairwise(path):
        travels = costs.latency if step.reason is Reason.TRANSFER else 0.0
        assert step.span.begin == before.span.end + travels
        assert step.span in timeline.spans[step.rank]
        if step.reason in (Reason.SAME_RANK, Reason.DEPENDENCY):
            assert step.rank == before.rank


def test_a_recorded_timeline_has_one_too() -> None:
    """Gaps between actions are nobody's: the step before is the one that was done last."""
    first, second = parse("0F0 0B0", "1F0 1B0")
    recorded = [
        [Span(first[0], 7.0, 8.01), Span(first[1], 11.3, 13.0)],
        [Span(second[0], 8.1, 9.1), Span(second[1], 9.2, 11.2)],
    ]
    path = critical_path(Timeline(recorded))
    assert [str(step.span.action) for step in path] == ["0F0", "1F0", "1B0", "0B0"]


def test_nothing_and_nonsense() -> None:
    assert critical_path(Timeline([[], []])) == []
    (actions,) = parse("0F1 1F0")
    with pytest.raises(ScheduleError, match="which no rank does"):
        critical_path(Timeline([[Span(action, 0.0, 1.0) for action in actions]]))


def test_1f1b_waits_for_the_way_there_and_back() -> None:
    path = critical_path(simulate(make("1f1b", 4, 1, 8)))
    assert sum(step.reason is Reason.TRANSFER for step in path) == 6
