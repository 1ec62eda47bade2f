"""Programs as words: there and back, and the same times and memory as the simulator's."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.pipeline.schedule import Kind, simulate
from megapipe.pipeline.schedule.action import sequential
from megapipe.pipeline.schedule.limit import peak_amounts
from megapipe.pipeline.schedule.search.named import named_programs
from megapipe.pipeline.schedule.words import (
    SchedulingProblem,
    join_first,
    makespan,
    peaks,
    split,
    to_program,
    to_words,
)
from tests.pipeline.schedule.problems import problem_of, problems


@given(problems())
def test_published_programs_as_words(problem: SchedulingProblem) -> None:
    """Bitwise the times of `simulate`: a search must not choose by rounding."""
    for _, program in named_programs(problem):
        words = to_words(program, problem.stages)
        assert to_program(words, problem.stages) == sequential(program)
        timeline = simulate(program, problem.costs)
        assert makespan(problem, words) == timeline.makespan
        assert peaks(problem, words) == peak_amounts(program, problem.limit.sizes)
        assert problem.bound <= timeline.makespan * (1 + 1e-12)


@given(problems())
def test_halves_are_never_slower_and_joining_costs_nothing(problem: SchedulingProblem) -> None:
    for _, program in named_programs(problem):
        words = to_words(program, problem.stages)
        halves = split(words, problem.stages)
        kinds = {action.kind for row in to_program(halves, problem.stages) for action in row}
        assert kinds == {Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT}
        time = makespan(problem, halves)
        assert time <= makespan(problem, words) * (1 + 1e-12)
        joined = join_first(halves, problem.stages)
        assert makespan(problem, joined) == pytest.approx(time, rel=1e-12)
        assert peaks(problem, joined) == peaks(problem, halves)


def test_only_halves_of_one_microbatch_are_joined() -> None:
    """I0 I1 W0 W1: the second I and the first W stand together and are of two microbatches."""
    assert join_first([[0, 0, 1, 1, 2, 2]], 1) == [[0, 0, 1, 1, 2, 2]]
    assert join_first([[0, 1, 2, 0, 1, 2]], 1) == [[0, 3, 0, 3]]
    assert join_first([[0, 0, 1, 1, 2, 2, 0, 1, 2]], 1) == [[0, 0, 1, 1, 2, 2, 0, 3]]


@given(st.permutations([0, 2, 4]))
def test_words_that_never_finish(tail: list[int]) -> None:
    """Rank 0 wants the gradient before it has given the forward; letters: F0 F1 I0 I1 W0 W1."""
    problem = problem_of(2, 1, 1)
    rank0 = [letter for letter in tail if letter != 4] + [4]
    finishes = rank0.index(0) < rank0.index(2)
    assert (makespan(problem, [rank0, [1, 3, 5]]) < inf) == finishes
