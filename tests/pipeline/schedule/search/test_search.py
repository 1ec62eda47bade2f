"""The search: right programs within the limit, never slower than the best published schedule, the
same each time, and what it makes of known cases."""

import time

import pytest
from hypothesis import given, settings

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Costs, Kind, lower, simulate, to_csv, validate
from megapipe.pipeline.schedule.action import stage_ranks
from megapipe.pipeline.schedule.build import SCHEDULES, build_program
from megapipe.pipeline.schedule.limit import Limit, Memory, peak_amounts
from megapipe.pipeline.schedule.search import FoundProgram, search
from megapipe.pipeline.schedule.words import SchedulingProblem
from tests.pipeline.schedule.problems import problems

LITTLE = 15_000
"""Effort that makes 200 cases a matter of seconds; more only finds more."""
ROUNDING = 1 + 1e-9


def look(problem: SchedulingProblem, effort: int = LITTLE) -> FoundProgram:
    pipeline = problem.pipeline
    virtual = problem.stages // pipeline
    return search(
        pipeline, virtual, problem.microbatches, problem.costs, problem.limit, effort=effort
    )


def best_published(problem: SchedulingProblem) -> float | None:
    """Of all that the library has for these ranks and chunks, by the simulator alone."""
    times = []
    for name in SCHEDULES:
        try:
            program = build_program(
                name,
                pipeline=problem.pipeline,
                virtual=problem.stages // problem.pipeline,
                microbatches=problem.microbatches,
            )
        except ScheduleError:
            continue
        if max(peak_amounts(program, problem.limit.sizes)) <= problem.limit.most * ROUNDING:
            times.append(simulate(program, problem.costs).makespan)
    return min(times, default=None)


@given(problems())
@settings(max_examples=200)
def test_right_within_the_limit_and_never_slower_than_the_best_published(
    problem: SchedulingProblem,
) -> None:
    found = look(problem)
    lowered = lower(found.program)
    validate(lowered)
    assert set(stage_ranks(lowered)) == set(range(problem.stages))
    assert 1 + max(action.microbatch for action in lowered[0]) == problem.microbatches
    assert max(peak_amounts(found.program, problem.limit.sizes)) <= problem.limit.most * ROUNDING
    took = simulate(found.program, problem.costs).makespan
    assert took == pytest.approx(found.chosen.makespan, rel=1e-12)
    published = best_published(problem)
    assert published is None or took <= published * ROUNDING
    assert took >= found.bound / ROUNDING


@given(problems())
@settings(max_examples=10)
def test_the_same_question_has_the_same_answer(problem: SchedulingProblem) -> None:
    first, second = look(problem), look(problem)
    assert to_csv(first.program) == to_csv(second.program)
    assert first.tried == second.tried


def in_microbatches(
    pipeline: int, virtual: int, microbatches: int, most: float, costs: Costs | None = None
) -> FoundProgram:
    limit = Limit.in_microbatches(most, pipeline, virtual)
    return search(pipeline, virtual, microbatches, costs or Costs(), limit)


def test_a_published_schedule_that_nothing_can_beat_is_taken_as_it_is() -> None:
    found = in_microbatches(4, 1, 8, 4)
    assert found.chosen.name == "zb-h1"
    assert found.chosen.makespan == found.bound == 27
    assert found.program == build_program("zb-h1", pipeline=4, virtual=1, microbatches=8)


def test_finds_more_than_the_pattern_where_memory_is_short() -> None:
    """Equal stages, three of 1F1B's four microbatches: V-Half takes 57, and 53 can be had."""
    found = in_microbatches(4, 2, 8, 3)
    v_half = next(one for one in found.tried if one.name == "v-half")
    assert v_half.makespan == 57
    assert found.chosen.makespan == 53


def test_finds_more_than_published_schedules_where_stages_are_unequal() -> None:
    """One stage half as slow again, the head expensive, little memory."""
    times = [1.0, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]
    found = in_microbatches(4, 2, 8, 2.5, Costs(times, times, times, 0.05))
    published = min(one.makespan for one in found.tried if one.name in SCHEDULES and one.fits)
    assert found.chosen.makespan < 0.95 * published


def test_one_microbatch_at_a_time_is_possible() -> None:
    found = in_microbatches(3, 1, 4, 1)
    assert found.chosen.peak == 1
    # Rank 0 waits for the way to the loss and back (6 and its own two) with each of the four.
    assert found.chosen.makespan == 4 * 7


def test_nobody_waits_for_the_input_gradient_of_the_first_stage() -> None:
    """So where its weight gradient follows at once, the two are one action."""
    costs = Costs([1.0, 1.0, 1.0, 1.7], [1.1, 1.0, 1.0, 1.7], [0.9, 1.0, 1.0, 1.7], 0.1)
    found = in_microbatches(4, 1, 6, 2, costs)
    assert found.chosen.name not in SCHEDULES
    kinds = [action.kind for action in found.program[0]]
    assert Kind.BACKWARD in kinds
    pairs = zip(found.program[0], found.program[0][1:], strict=False)
    for action, following in pairs:
        together = action.kind is Kind.BACKWARD_INPUT and following.kind is Kind.BACKWARD_WEIGHT
        assert not (together and action.microbatch == following.microbatch)


def test_a_limit_below_one_microbatch_is_refused_with_the_least_possible() -> None:
    with pytest.raises(ScheduleError, match=r"= 0.5 is below what any schedule .* at least 1\."):
        in_microbatches(4, 2, 8, 0.5)
    with pytest.raises(ScheduleError, match=r'"2 GiB" is below .* at least 3.5 GiB, lower train'):
        search(2, 1, 4, Costs(), Limit.in_bytes(Memory(2**31, "2 GiB"), [2**30, 3.5 * 2**30]))


@pytest.mark.parametrize("most", [16, 8])
def test_a_thousand_microbatches_on_sixteen_stages(most: float) -> None:
    """Long programs are made from short ones. (How long it takes is printed, not judged.)"""
    costs = Costs(*([1.0 + 0.05 * (s % 3) + 0.5 * (s == 15) for s in range(16)] for _ in range(3)))
    began = time.perf_counter()
    limit = Limit.in_microbatches(most, 16, 1)
    found = search(16, 1, 1000, costs, limit, effort=300_000)
    print(f"limit {most}: {time.perf_counter() - began:.1f} s, {found.chosen}")
    assert max(peak_amounts(found.program, limit.sizes)) <= most
    assert simulate(found.program, costs).makespan == pytest.approx(found.chosen.makespan)
    # With half of 1F1B's memory 1F1B can't run at all; a fifth more time is what it costs.
    assert found.chosen.makespan < (1.001 if most == 16 else 1.25) * found.bound
