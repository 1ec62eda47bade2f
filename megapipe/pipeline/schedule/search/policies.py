"""Policies: the patterns and rules of list scheduling that the search tries."""

from dataclasses import dataclass, replace
from itertools import product
from math import inf

from megapipe.pipeline.schedule.list_scheduling import PLAIN, Pattern, Rules, list_schedule
from megapipe.pipeline.schedule.words import SchedulingProblem, Words


@dataclass(frozen=True)
class Policy:
    """Rules, and a pattern that comes from the costs.

    The period T is the busiest rank's work for one microbatch. A microbatch goes through the ranks
    2 v times (forward and backward of each chunk); `stretch` says for each time how much slower
    than alone it does so, and `gap` how long it rests before its backward, in T / 3 v.
    """

    stretch: tuple[float, ...]
    gap: float = 0.0
    rules: Rules = PLAIN

    def __str__(self) -> str:
        words = ["stretch " + " ".join(f"{s:g}" for s in self.stretch)]
        words += [f"gap {self.gap:g}"] * (self.gap > 0)
        return ", ".join([*words, *filter(None, [str(self.rules)])])

    def pattern(self, problem: SchedulingProblem) -> Pattern:
        stages, pipeline = problem.stages, problem.pipeline
        period = max(problem.work)
        backward = reversed(range(stages, 2 * stages))
        now, offsets = 0.0, [0.0] * (2 * stages)
        for step, letter in enumerate((*range(stages), *backward)):
            if step == stages:
                now += self.gap * period * pipeline / (3 * stages)
            stretch = self.stretch[step // pipeline]
            now += stretch * problem.sources[letter][1]
            offsets[letter] = now
            now += stretch * problem.durations[letter]
        return Pattern(period, offsets)


def dispatch(problem: SchedulingProblem, policy: Policy) -> Words | None:
    """What list scheduling makes of the policy; None where it is stuck."""
    return list_schedule(problem, policy.pattern(problem), policy.rules)


def patterns(chunks: int) -> list[Policy]:
    """Policies that differ in their pattern. Per chunk and direction a microbatch goes at its own
    speed or half that: with two chunks, placed as a V, all at full speed is V-Min's pattern, every
    second at half speed V-Half's."""
    passes = 2 * chunks
    if chunks <= 2:
        stretches = list(product((1.0, 2.0), repeat=passes))
    else:
        stretches = [(1.0,) * passes, (2.0,) * passes, (2.0, 1.0) * chunks, (1.0, 2.0) * chunks]
    stretches += [(FIRST,) * passes, (-FIRST,) * passes, (0.5,) * passes]
    return [
        Policy(stretch, gap, Rules(strict, urgent=True))
        for strict, gap, stretch in product((False, True), (0.0, 1.0, 2.0), stretches)
        if not (gap and stretch[0] not in (1.0, 2.0))
    ]


FIRST = 1000.0
"""A stretch that outdoes any difference between microbatches: whatever comes first on the way is
taken first, forwards that is; or last, if it is negative."""


def variations(policy: Policy) -> list[Policy]:
    """The policy with other rules for weight gradients and for how many forwards run ahead."""
    delays = [(inf, False), (0.0, False), (1.0, True), (1.0, False), (2.0, True)]
    return [
        replace(
            policy,
            rules=Rules(policy.rules.strict, delay, by_rank, urgent, patience, ahead),
        )
        for ahead, (delay, by_rank), patience, urgent in product(
            (inf, 1.0, 2.0), delays, (0.0, 0.7), (True, False)
        )
        if not (patience and delay == 0)
    ]
