"""List scheduling: every policy writes a right program, and the options do what they say."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.pipeline.schedule import Costs, lower, validate
from megapipe.pipeline.schedule.list_scheduling import Rules
from megapipe.pipeline.schedule.search.policies import Policy, dispatch, patterns, variations
from megapipe.pipeline.schedule.words import SchedulingProblem, Words, makespan, peaks, to_program
from tests.pipeline.schedule.problems import problem_of, problems


@given(problems(), st.data())
@settings(max_examples=150)
def test_every_policy_is_right_or_says_that_it_is_stuck(
    problem: SchedulingProblem, data: st.DataObject
) -> None:
    ranks_hold = problem.limit.least(problem.ranks)
    if ranks_hold > problem.limit.ceiling:
        return
    policy = data.draw(st.sampled_from(patterns(problem.stages // problem.pipeline)))
    policy = data.draw(st.sampled_from(variations(policy)))
    words = dispatch(problem, policy)
    if words is None:
        assert policy.rules.strict, "only a strict order can be stuck"
        return
    validate(lower(to_program(words, problem.stages)))
    assert max(peaks(problem, words)) <= problem.limit.ceiling


def written(problem: SchedulingProblem, policy: Policy) -> Words:
    words = dispatch(problem, policy)
    assert words is not None
    return words


def plainly(**rules: float) -> Policy:
    return Policy((1.0, 1.0), rules=replace(Rules(), **rules))


def test_patterns_of_the_building_blocks() -> None:
    """With two chunks as a V, all at full speed is V-Min: 2 of 4 microbatches, 59 units."""
    problem = problem_of(4, 2, 8, most=2, v=True)
    words = written(problem, Policy((1.0,) * 4, rules=Rules(strict=True, urgent=True)))
    assert (makespan(problem, words), max(peaks(problem, words))) == (59, 2)


def test_weight_gradients_at_once_or_when_there_is_nothing_else() -> None:
    problem = problem_of(2, 1, 4)
    eager = written(problem, plainly(delay=0))
    lazy = written(problem, plainly())
    assert [letter for letter in eager[1] if letter >= 2] == [3, 5] * 4
    assert [letter for letter in lazy[1] if letter >= 2] == [3, 3, 3, 3, 5, 5, 5, 5]


def test_patience_waits_for_what_is_about_to_come() -> None:
    """Rank 0's second input gradient comes 0.5 after it has done the first, and a weight gradient
    takes 1: the patient rank waits."""
    costs = Costs([1.0, 1.0], [2.0, 1.5], [1.0, 1.0])
    problem = problem_of(2, 1, 2, costs=costs)
    hasty, patient = written(problem, plainly()), written(problem, plainly(patience=0.7))
    assert hasty[0] == [0, 0, 2, 4, 2, 4]
    assert patient[0] == [0, 0, 2, 2, 4, 4]


def test_ahead_keeps_the_memory_of_1f1b() -> None:
    problem = problem_of(4, 1, 12)
    forwards_first = Policy((1000.0, 1000.0))
    free = written(problem, forwards_first)
    tapered = written(problem, replace(forwards_first, rules=Rules(ahead=1)))
    assert peaks(problem, free)[0] == 12
    assert peaks(problem, tapered) == [4, 3, 2, 1]
