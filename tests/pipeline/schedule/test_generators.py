"""What the generators' docstrings promise, exactly: bubble and memory, for every shape.

Bubbles are for F = I = W = 1, and all quantities in chunks, so that they are whole numbers:
makespan = 3 v m + excess, and bubble = excess / (3 v m).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.pipeline.schedule import (
    SCHEDULES,
    Kind,
    Timeline,
    build_program,
    from_csv,
    lower,
    simulate,
    to_csv,
    validate,
)
from megapipe.pipeline.schedule.action import sequential, stage_ranks
from megapipe.pipeline.schedule.generators.interleaved import microbatch_groups
from tests.pipeline.programs import Shape, shapes

Form = Callable[[int, int, int], int]
"""(p, v, m) -> number."""


def v_half_excess(p: int, v: int, m: int) -> int:
    return max(3 * (p - 1) - p % 2, 4 * p - 2 * m - 3, 0) if p > 1 else 0


def v_min_excess(p: int, v: int, m: int) -> int:
    return 4 * p - 5 + 2 * (p % 3 == 0 and 3 * m > p) if p > 1 else 0


EXCESS: dict[str, Form] = {
    "gpipe": lambda p, v, m: 3 * (p - 1),
    "1f1b": lambda p, v, m: 3 * (p - 1),
    "interleaved-1f1b": lambda p, v, m: 3 * (p - 1) + 3 * (v - 1) * max(0, p - m),
    "zb-h1": lambda p, v, m: p - 1 + max(0, p - m),
    "zb-h2": lambda p, v, m: max(p - 1, 2 * (p - 1) - m // 2),
    "zb-v": lambda p, v, m: max(p - 1, 2 * (2 * p - m - 1)),
    "v-half": v_half_excess,
    "v-min": v_min_excess,
    "dualpipe-v": lambda p, v, m: p - 1,
}


def interleaved_live(p: int, v: int, m: int) -> list[int]:
    group = len(microbatch_groups(m, p)[0])
    return [min(v * m, 2 * (p - rank - 1) + (v - 1) * group + 1) for rank in range(p)]


LIVE: dict[str, Callable[[int, int, int], Sequence[int]]] = {
    "gpipe": lambda p, v, m: [m] * p,
    "1f1b": lambda p, v, m: [min(m, p - rank) for rank in range(p)],
    "interleaved-1f1b": interleaved_live,
    "zb-h1": lambda p, v, m: [min(m, p)] * p,
    "zb-h2": lambda p, v, m: [min(m, 2 * p - 1)] * p,
    "dualpipe-v": lambda p, v, m: [2 * p + 1] * p,
}
"""Chunks live on each rank, where the docstring gives it for each; below, for the fullest one."""

MOST_LIVE: dict[str, Form] = {
    "zb-v": lambda p, v, m: 2 * min(m, p),
    "v-half": lambda p, v, m: min(2 * m, p + 1 + (p % 2 == 0)),
    "v-min": lambda p, v, m: min(2 * m, 2 * ceil((p + 2) / 3)),
}


def test_every_schedule_has_its_forms() -> None:
    """A new schedule gets a line in EXCESS, and in LIVE or MOST_LIVE."""
    assert set(EXCESS) == set(LIVE) | set(MOST_LIVE) == set(SCHEDULES)


def timeline_of(shape: Shape) -> Timeline:
    return simulate(shape.program())


@pytest.mark.parametrize("name", SCHEDULES)
@given(st.data())
def test_bubble_and_memory_are_those_of_the_docstring(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes([name], ranks=9))
    _, p, v, m = shape
    timeline = timeline_of(shape)
    assert timeline.makespan == 3 * v * m + EXCESS[name](p, v, m)
    assert timeline.bubble == pytest.approx(EXCESS[name](p, v, m) / (3 * v * m), rel=1e-12)
    if name in LIVE:
        assert timeline.peak_live == LIVE[name](p, v, m)
    else:
        assert max(timeline.peak_live) == MOST_LIVE[name](p, v, m)


@given(shapes())
def test_every_program_can_run_where_its_placement_says(shape: Shape) -> None:
    _, p, v, m = shape
    program = shape.program()
    placement = SCHEDULES[shape.name].placement(p, v)
    assert stage_ranks(program) == dict(enumerate(placement))
    assert {a.microbatch for row in sequential(program) for a in row} == set(range(m))
    lowered = lower(program)
    validate(lowered, max_live=max(simulate(program).peak_live))
    for text in (program, lowered):
        assert from_csv(to_csv(text)) == text


@given(shapes())
def test_building_is_a_pure_function(shape: Shape) -> None:
    assert shape.program() == shape.program()


@pytest.mark.parametrize(
    ("name", "pending"),
    [
        ("1f1b", lambda p, rank: 0),
        ("zb-h1", lambda p, rank: rank + 1),
        ("zb-h2", lambda p, rank: 2 * rank + 1),
        ("zb-v", lambda p, rank: 2 * rank + 1),
        ("dualpipe-v", lambda p, rank: rank + 1),
    ],
)
def test_weight_gradients_that_wait(name: str, pending: Callable[[int, int], int]) -> None:
    for p in (1, 2, 4, 5):
        timeline = timeline_of(Shape(name, p, SCHEDULES[name].chunks[0], 4 * p))
        assert timeline.peak_pending == [pending(p, rank) for rank in range(p)]


@given(st.integers(1, 8), st.integers(0, 10))
def test_no_rank_of_zb_h2_waits_within_its_work(p: int, more: int) -> None:
    for spans in timeline_of(Shape("zb-h2", p, 1, 2 * p - 1 + more)).spans:
        assert all(a.end == b.begin for a, b in pairwise(spans))


@given(st.integers(1, 8), st.integers(1, 20))
def test_1f1b_is_interleaved_1f1b_without_its_warmup(pipeline: int, microbatches: int) -> None:
    """Interleaving has 2 (p - rank - 1) forwards ahead, 1F1B half of them; it keeps the rest."""
    for rank, row in enumerate(Shape("1f1b", pipeline, 1, microbatches).program()):
        ahead = min(pipeline - rank - 1, microbatches)
        kinds = "F" * ahead + "FB" * (microbatches - ahead) + "B" * ahead
        assert "".join(action.kind for action in row) == kinds
        for kind in "FB":
            assert [a.microbatch for a in row if a.kind == kind] == list(range(microbatches))


@pytest.mark.parametrize(
    ("p", "name", "v", "peak"),
    [
        (4, "1f1b", 1, 4.0),
        (4, "interleaved-1f1b", 2, 5.5),
        (4, "interleaved-1f1b", 4, 4.75),
        (8, "interleaved-1f1b", 2, 11.5),
        (8, "interleaved-1f1b", 4, 9.75),
        (4, "zb-h1", 1, 4.0),
        (4, "zb-v", 2, 4.0),
        (8, "zb-v", 2, 8.0),
        (4, "dualpipe-v", 2, 4.5),
        (8, "v-half", 2, 5.0),
        (8, "v-min", 2, 4.0),
    ],
)
def test_peaks_of_the_literature(p: int, name: str, v: int, peak: float) -> None:
    assert max(timeline_of(Shape(name, p, v, 32)).peak_microbatches) == peak


def test_overlapped_pairs_are_a_forward_and_a_backward_of_two_chunks() -> None:
    p, m = 4, 12
    program = build_program("dualpipe-v", pipeline=p, virtual=2, microbatches=m)
    for rank, row in enumerate(program):
        pairs = [action.parts for action in row if action.kind is Kind.OVERLAP]
        # The published count: 2 (m - 2 p + rank + 1) in the steady part, p - rank - 1 in the next;
        # the last rank does not overlap its first pair.
        assert len(pairs) == 2 * (m - 2 * p + rank + 1) + p - rank - 1 - (rank == p - 1)
        for forward, backward in pairs:
            assert {forward.stage, backward.stage} == {rank, 2 * p - 1 - rank}
