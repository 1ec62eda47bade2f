"""The best program that can be found for given costs within a limit of memory.

For each placement of the stages, in this order:

1. the published schedules, as they are;
2. list scheduling with many `policies`, first those that differ in their pattern, then other rules
   for weight gradients around the best of them;
3. local search (`improve`) from the best policies and the best published schedule.

A long program is searched for on a short one of the same stages: policies that are best there are
tried at full length, what local search found is made longer (`extend`), and local search goes on
from the best of these. Published schedules are always measured at full length, so the result is
never worse than the best of them. Effort is counted in actions looked at, not in seconds: the same
question has the same answer everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megapipe.pipeline.schedule.action import Program
from megapipe.pipeline.schedule.build import SCHEDULES
from megapipe.pipeline.schedule.limit import Limit, check_least
from megapipe.pipeline.schedule.placement import looped, v_shaped
from megapipe.pipeline.schedule.search.extend import extensions, shorter
from megapipe.pipeline.schedule.search.graph import TIE
from megapipe.pipeline.schedule.search.improve import Budget, improve
from megapipe.pipeline.schedule.search.named import named_programs
from megapipe.pipeline.schedule.search.policies import Policy, dispatch, patterns, variations
from megapipe.pipeline.schedule.simulate import Costs
from megapipe.pipeline.schedule.words import (
    SchedulingProblem,
    Words,
    join_first,
    makespan,
    peaks,
    split,
    to_program,
    to_words,
)

EFFORT = 2_000_000
"""Actions looked at, about 3 s of one core."""
SHORT = 2_500
"""Actions of a program that is searched for directly; longer ones are made from such."""
DISPATCH = 4
"""What list scheduling costs for each action."""
KEPT = 0.25
"""The share of the effort that is kept for the full length, where a program is long."""
STARTS = 3
"""Results of list scheduling from which local search begins."""

LIST_SCHEDULING, LOCAL_SEARCH = "list scheduling", "local search"


@dataclass(frozen=True)
class Tried:
    """A candidate: what it is, where its stages are, and what it would do."""

    name: str
    placement: str
    makespan: float
    peak: float  # of the rank that holds most, in the unit of the limit
    fits: bool
    note: str = ""


@dataclass(frozen=True)
class FoundProgram:
    """The program that was chosen, and all that was tried; `bound` is a time that no order with
    these stages can beat."""

    program: Program
    chosen: Tried
    tried: tuple[Tried, ...]
    bound: float
    ranks: tuple[int, ...]  # of each stage
    microbatches: int
    costs: Costs
    limit: Limit

    @property
    def pipeline(self) -> int:
        return len(self.program)


@dataclass(frozen=True)
class _Candidate:
    """`program` where there is one that the words don't say all of (pairs that may overlap)."""

    tried: Tried
    words: Words
    program: Program | None = None


def search(
    pipeline: int,
    virtual: int,
    microbatches: int,
    costs: Costs,
    limit: Limit,
    *,
    effort: int = EFFORT,
) -> FoundProgram:
    """The best program for so many ranks, stages on each, and microbatches.

    `costs` and `limit` are for the pipeline * virtual stages. Among programs of equal time the one
    with less memory wins, and then a published one. Raises ScheduleError for a limit that not even
    one microbatch keeps.
    """
    placements = {"looped": tuple(looped(pipeline, virtual))}
    if virtual > 1 and pipeline > 1:
        placements["V"] = tuple(v_shaped(pipeline, virtual))
    check_least(limit, min(placements.values(), key=limit.least))
    placements = {n: r for n, r in placements.items() if limit.least(r) <= limit.ceiling}
    candidates: list[_Candidate] = []
    for name, ranks in placements.items():
        problem = SchedulingProblem(ranks, microbatches, costs, limit)
        budget = Budget(effort // len(placements))
        candidates += _candidates(problem, name, budget)
    fitting = [candidate for candidate in candidates if candidate.tried.fits]
    fastest = min(candidate.tried.makespan for candidate in fitting)
    ties = [one for one in fitting if one.tried.makespan <= fastest * (1 + TIE)]
    best = min(ties, key=lambda one: (one.tried.peak, one.tried.name not in SCHEDULES))
    ranks = placements[best.tried.placement]
    return FoundProgram(
        best.program or to_program(best.words, len(ranks)),
        best.tried,
        tuple(candidate.tried for candidate in candidates),
        min(SchedulingProblem(r, microbatches, costs, limit).bound for r in placements.values()),
        ranks,
        microbatches,
        costs,
        limit,
    )


def _candidates(problem: SchedulingProblem, placement: str, budget: Budget) -> list[_Candidate]:
    """What the three families have for one placement."""
    found = []
    for name, program in named_programs(problem):
        words = to_words(program, problem.stages)
        found.append(_Candidate(_tried(problem, name, placement, words), words, program))
    if any(one.tried.fits and _done(problem, one.tried.makespan) for one in found):
        return found
    searched = _Searched(problem, placement, budget)
    return [*found, *searched.run()]


def _tried(
    problem: SchedulingProblem, name: str, placement: str, words: Words, note: str = ""
) -> Tried:
    peak = max(peaks(problem, words))
    fits = peak <= problem.limit.ceiling
    return Tried(name, placement, makespan(problem, words), peak, fits, note)


def _done(problem: SchedulingProblem, time: float) -> bool:
    """Whether nothing can be faster."""
    return time <= problem.bound * (1 + TIE)


Ranked = list[tuple[float, Words, str]]
"""Makespan, words and origin, the best first."""


class _Searched:
    """The search on one placement beyond published schedules."""

    def __init__(self, problem: SchedulingProblem, placement: str, budget: Budget) -> None:
        self.problem, self.placement, self.budget = problem, placement, budget
        stages, pipeline = problem.stages, problem.pipeline
        count = problem.microbatches
        if 3 * stages * count > SHORT:
            count = shorter(count, stages, pipeline, SHORT)
        self.short = replace(problem, microbatches=count)
        self.tries = 0

    def run(self) -> Iterator[_Candidate]:
        """The best of list scheduling, and the best of local search."""
        policies = self._policies()
        listed = [(time, words, str(policy)) for time, words, policy in policies]
        starts = _distinct(listed, STARTS) + self._best_named()
        long = self.short.microbatches < self.problem.microbatches
        kept = int(self.budget.left * KEPT) if long else 0
        self.budget.left -= kept
        improved = self._improved(self.short, starts)
        if long:
            self.budget.left += kept
            full = self._full_length(policies)
            listed = _ranked(full)
            longer = [
                (makespan(self.problem, words), words, origin)
                for _, start, origin in improved
                for words in extensions(
                    self.short, start, self.problem.microbatches - self.short.microbatches
                )
            ]
            improved = self._improved(self.problem, _ranked(longer + full)[:1])
        for name, results in ((LIST_SCHEDULING, listed), (LOCAL_SEARCH, improved)):
            if results:
                yield self._candidate(name, results[0])

    def _candidate(self, name: str, result: tuple[float, Words, str]) -> _Candidate:
        time, words, origin = result
        joined = join_first(words, self.problem.stages)
        if makespan(self.problem, joined) <= time:
            words = joined
        note = f"best of {self.tries}: {origin}" if name == LIST_SCHEDULING else f"from {origin}"
        return _Candidate(_tried(self.problem, name, self.placement, words, note), words)

    def _policies(self) -> list[tuple[float, Words, Policy]]:
        """Makespans of the short problem under all policies that the budget allows, best first."""
        chunks = self.problem.stages // self.problem.pipeline
        half = self.budget.left // 2
        results = self._dispatch(patterns(chunks), self.budget.left - half)
        best = [policy for _, _, policy in sorted(results, key=lambda result: result[0])[:STARTS]]
        around = [variation for policy in best for variation in variations(policy)]
        results += self._dispatch(around, self.budget.left - half)
        return sorted(results, key=lambda result: result[0])

    def _dispatch(self, policies: list[Policy], effort: int) -> list[tuple[float, Words, Policy]]:
        """At least the first policy, which always has a result."""
        each = DISPATCH * 3 * self.short.stages * self.short.microbatches
        results: list[tuple[float, Words, Policy]] = []
        for policy in policies:
            if results and (effort < each or _done(self.short, results[-1][0])):
                break
            effort -= each
            self.budget.spend(each)
            self.tries += 1
            words = dispatch(self.short, policy)
            if words is not None:
                results.append((makespan(self.short, words), words, policy))
        return results

    def _best_named(self) -> Ranked:
        fitting = []
        for name, program in named_programs(self.short):
            words = split(to_words(program, self.short.stages), self.short.stages)
            if max(peaks(self.short, words)) <= self.short.limit.ceiling:
                fitting.append((makespan(self.short, words), words, name))
        return _ranked(fitting)[:1]

    def _improved(self, problem: SchedulingProblem, starts: Ranked) -> Ranked:
        """Local search from each start, which shares the budget with those after it."""
        results = []
        for index, (_, words, origin) in enumerate(starts):
            share = self.budget.left // (len(starts) - index)
            budget = Budget(share)
            results.append((*improve(problem, words, budget), origin))
            self.budget.spend(share - max(0, budget.left))
        return _ranked(results)

    def _full_length(self, policies: list[tuple[float, Words, Policy]]) -> Ranked:
        """The best policies at full length."""
        best = list(dict.fromkeys(policy for _, _, policy in policies))[:STARTS]
        found = []
        for policy in best:
            words = dispatch(self.problem, policy)
            if words is not None:
                found.append((makespan(self.problem, words), words, str(policy)))
        return found


def _ranked(results: Ranked) -> Ranked:
    return sorted(results, key=lambda result: result[0])


def _distinct(results: Ranked, count: int) -> Ranked:
    """The best `count` that are not the same words."""
    kept: Ranked = []
    for result in results:
        if len(kept) == count:
            break
        if all(result[1] != other[1] for other in kept):
            kept.append(result)
    return kept
