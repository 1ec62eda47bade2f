"""Closed forms (Narayanan et al. 2021; Huang et al. 2019), latency, uneven stages, the picture."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Costs, Span, Timeline, lower, simulate
from tests.pipeline.programs import make, parse, split_backwards

small = st.integers(1, 8)


@given(st.sampled_from(["gpipe", "1f1b"]), small, st.integers(1, 24))
def test_bubble_of_one_chunk(name: str, p: int, m: int) -> None:
    timeline = simulate(make(name, p, 1, m))
    assert timeline.makespan == 3 * (m + p - 1)
    assert timeline.bubble == (p - 1) / m


@given(small, st.integers(1, 5), st.integers(1, 5))
def test_bubble_of_interleaving(p: int, v: int, rounds: int) -> None:
    m = rounds * p
    assert simulate(make("interleaved-1f1b", p, v, m)).bubble == (p - 1) / (v * m)


@given(small, st.integers(1, 24))
def test_peak_of_one_chunk(p: int, m: int) -> None:
    assert simulate(make("gpipe", p, 1, m)).peak_live == [m] * p
    assert simulate(make("1f1b", p, 1, m)).peak_live == [min(m, p - rank) for rank in range(p)]


@given(small, st.integers(2, 5))
def test_peak_of_interleaving(p: int, v: int) -> None:
    timeline = simulate(make("interleaved-1f1b", p, v, 4 * p))
    assert timeline.peak_live[0] == p * v + p - 1
    assert timeline.peak_microbatches[0] == pytest.approx(p + (p - 1) / v, rel=1e-12)


@pytest.mark.parametrize(
    ("p", "v", "peak"), [(4, 1, 4.0), (4, 2, 5.5), (4, 4, 4.75), (8, 2, 11.5), (8, 4, 9.75)]
)
def test_peaks_of_the_literature(p: int, v: int, peak: float) -> None:
    name = "interleaved-1f1b" if v > 1 else "1f1b"
    assert max(simulate(make(name, p, v, 32)).peak_microbatches) == peak


def test_activations_live_until_their_weight_gradient() -> None:
    at_once = split_backwards(make("1f1b", 4, 1, 8), delay=0)
    late = split_backwards(make("1f1b", 4, 1, 8), delay=2)
    assert simulate(at_once).peak_live == [4, 3, 2, 1]
    assert simulate(late).peak_live == [6, 5, 4, 3]


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
