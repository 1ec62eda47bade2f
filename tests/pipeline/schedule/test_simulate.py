"""Against an independent simulator; memory, latency, uneven stages, the picture.

The closed forms of the schedules are in test_generators.
"""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Costs, Program, Span, Timeline, lower, simulate
from megapipe.pipeline.schedule.action import stage_ranks
from tests.pipeline.programs import make, parse, programs, split_backwards
from tests.pipeline.schedule.reference import reference_times

units = st.integers(1, 9).map(float)


@st.composite
def costs_for(draw: st.DrawFn, stages: int) -> Costs:
    """Whole numbers, so that sums are exact; one for all stages or one for each."""

    def cost() -> float | list[float]:
        return draw(units | st.lists(units, min_size=stages, max_size=stages))

    return Costs(cost(), cost(), cost(), draw(st.integers(0, 5)))


@settings(max_examples=50)
@given(programs, st.data())
def test_as_an_independent_simulator_says(program: Program, data: st.DataObject) -> None:
    costs = data.draw(costs_for(len(stage_ranks(program))))
    expected = reference_times(program, costs.of, costs.latency)
    timeline = simulate(program, costs)
    spans = [span for row in timeline.spans for span in row]
    assert expected == {span.action: (span.begin, span.end) for span in spans}
    end = max(span.end for span in spans)
    busy = [sum(span.duration for span in row) for row in timeline.spans]
    assert timeline.makespan == end
    assert timeline.bubble == pytest.approx(len(busy) * end / sum(busy) - 1)
    assert timeline.bubble_per_rank == pytest.approx([end / time - 1 for time in busy])


@settings(max_examples=50)
@given(programs, st.data())
def test_a_receive_that_is_posted_late_costs_its_transfer_at_most(
    program: Program, data: st.DataObject
) -> None:
    """`lower` knows no costs. A tensor that has been sent begins to travel after the action before
    the one that uses it, at the latest: as if that took the transfer's time longer."""
    costs = data.draw(costs_for(len(stage_ranks(program))))
    before, after = simulate(program, costs), simulate(lower(program), costs)
    latency = costs.latency

    def longer(times: float | Sequence[float]) -> float | list[float]:
        if isinstance(times, int | float):
            return times + latency
        return [time + latency for time in times]

    bound = Costs(
        longer(costs.forward), longer(costs.backward_input), longer(costs.backward_weight), latency
    )
    assert before.makespan <= after.makespan <= simulate(program, bound).makespan
    if not latency:
        assert after.makespan == before.makespan


def test_activations_live_until_their_weight_gradient() -> None:
    at_once = split_backwards(make("1f1b", 4, 1, 8), delay=0)
    late = split_backwards(make("1f1b", 4, 1, 8), delay=2)
    assert simulate(at_once).peak_live == [4, 3, 2, 1]
    assert simulate(late).peak_live == [6, 5, 4, 3]


def test_weight_gradients_wait_from_input_gradient_to_their_own() -> None:
    assert simulate(make("1f1b", 4, 1, 8)).peak_pending == [0, 0, 0, 0]
    for delay in (0, 2):
        late = simulate(split_backwards(make("1f1b", 4, 1, 8), delay))
        assert late.peak_pending == [delay + 1] * 4
    assert simulate(parse("0F0 0F1 0I0 0I1 0W1 0W0")).peak_pending == [2]


def test_each_rank_has_its_bubble() -> None:
    """Until the slowest is done: rank 1 works 9 of 15 units, rank 0 works 6."""
    timeline = simulate(make("gpipe", 2, 1, 1), Costs([2.0, 3.0], [2.0, 3.0], [2.0, 3.0]))
    assert timeline.bubble_per_rank == [15 / 6 - 1, 15 / 9 - 1]


def test_nothing_is_live_beyond_a_forward_without_backwards() -> None:
    assert simulate(make("forward", 2, 2, 4)).peak_live == [1, 1]


def test_latency_delays_what_crosses_ranks_only() -> None:
    program = parse("0F0 1F0 1B0 0B0")
    assert simulate(program, Costs(latency=5.0)).makespan == 6.0
    program = parse("0F0 0B0", "1F0 1B0")
    for timeline in (
        simulate(program, Costs(latency=0.5)),
        simulate(lower(program), Costs(latency=0.5)),
    ):
        assert timeline.makespan == 1 + 0.5 + 1 + 2 + 0.5 + 2


def test_interleaving_hides_latency() -> None:
    """5% of a forward per hop, of a chunk's forward where there are chunks: p = 4, m = 32."""
    latency = Costs(latency=0.05)
    assert simulate(make("1f1b", 4, 1, 32), latency).bubble == pytest.approx(0.121, abs=0.0005)
    looped = simulate(make("interleaved-1f1b", 4, 2, 32), latency)
    assert looped.bubble == pytest.approx(0.051, abs=0.001)


def test_a_late_receive_delays_the_transfer() -> None:
    timely = parse("0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1RECV_F1 1F0 1F1")
    late = parse("0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1F0 1RECV_F1 1F1")
    costs = Costs(forward=1.0, latency=1.0)
    assert simulate(timely, costs).makespan == 4.0
    assert simulate(late, costs).makespan == 5.0


def test_each_stage_has_its_costs() -> None:
    costs = Costs(forward=[1.0, 4.0], backward_input=[10.0, 20.0], backward_weight=0.5)
    timeline = simulate(parse("0F0 0B0", "1F0 1I0 1W0"), costs)
    assert [list(span[1:]) for span in timeline.spans[0]] == [[0.0, 1.0], [25.0, 35.5]]
    assert [list(span[1:]) for span in timeline.spans[1]] == [[1.0, 5.0], [5.0, 25.0], [25.0, 25.5]]
    busy = 1.0 + 10.5 + 4.0 + 20.5
    assert timeline.bubble == pytest.approx(2 * 35.5 / busy - 1)


def test_what_never_finishes_has_no_timeline() -> None:
    with pytest.raises(ScheduleError, match=r"1F0 .* needs 0F0, which no rank does"):
        simulate(parse("0F1", "1F0"))


def test_picture() -> None:
    assert simulate(lower(make("1f1b", 3, 1, 3))).text() == (
        "rank 0  F0F1F2........B0--..B1--..B2--\n"
        "rank 1  ..F0F1....B0--F2B1--..B2--....\n"
        "rank 2  ....F0B0--F1B1--F2B2--........\n"
    )
    assert (
        simulate(make("gpipe", 1, 1, 12)).text(columns=12)
        == "rank 0  F0F1F2F3F4F5F6F7F8F9F0F1 ...\n"
    )


def test_a_picture_takes_no_more_than_it_shows() -> None:
    """A backward of 10^20 cells fills the columns that are left, and no list is longer."""
    costs = Costs(forward=1e-20, backward_input=1.0, backward_weight=1.0)
    assert simulate(make("1f1b", 2, 1, 2), costs).text(columns=6) == (
        "rank 0  F0F1........ ...\nrank 1  ..F0B0------ ...\n"
    )


def test_picture_of_a_recorded_timeline() -> None:
    """Times of no common unit: cells are those of the shortest action."""
    first, second = parse("0F0 0B0", "1F0 1B0")
    spans = [
        [Span(first[0], 7.0, 8.01), Span(first[1], 11.1, 13.0)],
        [Span(second[0], 8.1, 9.1), Span(second[1], 9.1, 11.2)],
    ]
    timeline = Timeline(spans)
    assert timeline.makespan == pytest.approx(6.0)
    assert timeline.text() == "rank 0  F0......B0--\nrank 1  ..F0B0--....\n"
