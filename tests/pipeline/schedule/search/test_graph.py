"""The graph's times are the simulator's, and its estimates tell what moves do."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.pipeline.schedule.search.graph import Graph, Move, neighbours
from megapipe.pipeline.schedule.search.improve import Budget, improve
from megapipe.pipeline.schedule.search.policies import dispatch, patterns
from megapipe.pipeline.schedule.words import SchedulingProblem, Words, makespan, peaks
from tests.pipeline.schedule.problems import problem_of, problems


def some_words(problem: SchedulingProblem) -> Words:
    words = dispatch(problem, patterns(problem.stages // problem.pipeline)[0])
    assert words is not None
    return words


@given(problems())
def test_longest_ways(problem: SchedulingProblem) -> None:
    """A node's head, its duration and its tail make the makespan on the longest way, and no more
    anywhere; the blocks are such a way."""
    words = some_words(problem)
    graph = Graph(problem, words)
    assert graph.measure()
    assert graph.words() == words
    assert graph.makespan == makespan(problem, words)
    through = [h + d + t for h, d, t in zip(graph.head, graph.duration, graph.tail, strict=True)]
    assert max(through) == pytest.approx(graph.makespan)
    way = [
        node for rank, first, last in graph.blocks() for node in graph.order[rank][first : last + 1]
    ]
    assert all(through[node] == pytest.approx(graph.makespan) for node in way)


@given(problems(), st.integers(0, 2**32))
@settings(max_examples=100)
def test_moves(problem: SchedulingProblem, seed: int) -> None:
    """An allowed move keeps the limit. Where it makes no cycle, the estimate of two that change
    places is at most the time that they then have, and that time if it is longer than before: the
    longest way goes through them. (Of a longer move, what is passed may wait for another that is,
    over other ranks, which the estimate does not see.)"""
    draw = random.Random(seed)
    graph = Graph(problem, some_words(problem))
    graph.measure()
    for _ in range(10):
        moves = list(neighbours(graph.blocks(), 4))
        allowed = [move for move in moves if graph.allowed(move)]
        if not allowed:
            return
        move = draw.choice(allowed)
        before, estimate = graph.makespan, graph.estimate(move)
        graph.apply(move)
        if not graph.measure():
            graph.apply(Move(move.rank, move.target, move.source))
            assert graph.measure()
            assert graph.makespan == before
            continue
        assert max(peaks(problem, graph.words())) <= problem.limit.ceiling
        assert makespan(problem, graph.words()) == graph.makespan
        if abs(move.source - move.target) == 1:
            assert estimate <= graph.makespan * (1 + 1e-9)
            if graph.makespan > before:
                assert estimate == pytest.approx(graph.makespan, rel=1e-9)


def test_what_a_rank_must_not_do() -> None:
    """Letters with one rank: F0 I1 W2, two microbatches, one live at a time."""
    problem = problem_of(1, 1, 2, most=1)
    graph = Graph(problem, [[0, 1, 2, 0, 1, 2]])
    assert not graph.allowed(Move(0, 1, 0)), "a backward before its forward"
    assert not graph.allowed(Move(0, 2, 1)), "a weight gradient before its input gradient"
    assert not graph.allowed(Move(0, 3, 0)), "microbatch 1 before 0"
    assert not graph.allowed(Move(0, 3, 2)), "two live"
    roomy = Graph(problem_of(1, 1, 2, most=2), [[0, 1, 2, 0, 1, 2]])
    assert roomy.allowed(Move(0, 3, 2))


def test_local_search_mends_a_bad_order() -> None:
    """All weight gradients at once after each input gradient: 1F1B's time. ZB-H1's can be had."""
    problem = problem_of(4, 1, 8, most=4)
    words = some_words(problem)
    eager = [
        [part for letter in word if letter < 8 for part in (letter, letter + 4)[: 1 + letter // 4]]
        for word in words
    ]
    assert makespan(problem, eager) > 27
    time, found = improve(problem, eager, Budget(10**6))
    assert time == makespan(problem, found) == problem.bound == 27


def test_a_budget_that_is_spent_ends_the_search() -> None:
    problem = problem_of(4, 2, 8, most=2)
    words = some_words(problem)
    budget = Budget(1)
    assert improve(problem, words, budget) == (makespan(problem, words), words)
    assert budget.left < 0
