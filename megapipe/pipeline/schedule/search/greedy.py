"""List scheduling: ranks that always do what a policy finds best among what they can do now.

The same idea as `list_schedule`, which follows a fixed pattern of times; here the pattern comes
from the costs, and what a rank prefers has several settings, all of which are cheap to try.
"""

from collections import deque
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import product
from math import inf

from megapipe.pipeline.schedule.search.words import Problem, Word, Words


@dataclass(frozen=True)
class Policy:
    """What a rank prefers.

    The next forward or input gradient is the one that comes first in a pattern: microbatch m comes
    to a stage at `T * m + offset`, T being the busiest rank's work for one microbatch. A microbatch
    goes through the ranks 2 v times (forward and backward of each chunk); `stretch` says for each
    time how much slower than alone it does so, and `gap` how long it rests before its backward, in
    T / 3 v. Of the actions that could begin, the first in the pattern is taken; with `strict`,
    forwards are done in the order of the pattern, and so are input gradients.

    Weight gradients fill the time in which there is nothing else, but

    - one is done at once where more than `delay` (times the rank's number, with `by_rank`) wait,
      or, with `urgent`, where a forward could begin if there were memory for it;
    - none is begun where something else arrives within `patience` times its duration.

    Rank r has at most `ahead * (p - r)` of what one microbatch takes live, if that is below the
    limit.
    """

    stretch: tuple[float, ...]
    gap: float = 0.0
    strict: bool = False
    delay: float = inf
    by_rank: bool = False
    urgent: bool = False
    patience: float = 0.0
    ahead: float = inf

    def __str__(self) -> str:
        words = ["stretch " + " ".join(f"{s:g}" for s in self.stretch)]
        words += [f"gap {self.gap:g}"] * (self.gap > 0) + ["strict"] * self.strict
        if self.delay < inf:
            words.append(f"delay {self.delay:g}" + " * rank" * self.by_rank)
        words += ["urgent"] * self.urgent
        words += [f"patience {self.patience:g}"] * (self.patience > 0)
        words += [f"ahead {self.ahead:g}"] * (self.ahead < inf)
        return ", ".join(words)


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
        Policy(stretch, gap, strict, urgent=True)
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
        replace(policy, delay=delay, by_rank=by_rank, urgent=urgent, patience=patience, ahead=ahead)
        for ahead, (delay, by_rank), patience, urgent in product(
            (inf, 1.0, 2.0), delays, (0.0, 0.7), (True, False)
        )
        if not (patience and delay == 0)
    ]


def dispatch(problem: Problem, policy: Policy) -> Words | None:
    """The words that ranks with this policy write, within the limit.

    None where a strict order can't go on in the memory that there is. Without `strict` that does
    not happen if the limit allows one microbatch: before a rank lets a microbatch into one of its
    stages, it has room for it at all stages that are still to come, so that the first microbatch
    under way never waits for memory.
    """
    return _Ranks(problem, policy).run()


class _Rank:
    """One rank's work and memory. Lists over its stages."""

    def __init__(self, problem: Problem, policy: Policy, rank: int) -> None:
        self.stages = problem.own[rank]
        sizes = [problem.limit.sizes[stage] for stage in self.stages]
        self.sizes = sizes
        self.letters = [
            *enumerate(self.stages),
            *((-1, problem.stages + stage) for stage in self.stages),
        ]
        self.room = [sum(sizes[index:]) for index in range(len(sizes))]
        """What a forward must find free: its own size and that of the rank's later stages."""
        ahead = max(1.0, policy.ahead * (problem.pipeline - rank)) * self.room[0]
        self.most = min(problem.limit.ceiling, ahead * (1 + 1e-9))
        if policy.strict:
            self.room = sizes
        self.delay = policy.delay * rank if policy.by_rank else policy.delay
        self.pending: deque[int] = deque()  # stages (as indices) whose weight gradients wait
        self.live = 0.0
        self.free_at = 0.0
        self.word: Word = []


class _Ranks:
    def __init__(self, problem: Problem, policy: Policy) -> None:
        self.problem, self.policy = problem, policy
        stages = problem.stages
        self.ranks = [_Rank(problem, policy, rank) for rank in range(problem.pipeline)]
        self.period = max(problem.work)
        self.offsets = _offsets(problem, policy, self.period)
        self.done = [0] * (2 * stages)
        self.arrivals: list[list[float]] = [[] for _ in range(2 * stages)]
        """When what each letter of F and I needs is there, as soon as that is known."""
        self.arrivals[0] = [0.0] * problem.microbatches
        self.feeds: list[list[int]] = [[] for _ in range(2 * stages)]
        for letter, (source, _) in enumerate(problem.sources):
            if source >= 0:
                self.feeds[source].append(letter)
        self.wakes = [(0.0, rank) for rank in range(problem.pipeline)]

    def run(self) -> Words | None:
        while self.wakes:
            now, number = heappop(self.wakes)
            rank = self.ranks[number]
            if rank.free_at <= now:
                letter = self._choose(rank, now)
                if letter >= 0:
                    self._begin(rank, number, letter, now)
        if any(count < self.problem.microbatches for count in self.done):
            return None
        return [rank.word for rank in self.ranks]

    def _choose(self, rank: _Rank, now: float) -> int:
        """The letter to begin, -1 to wait."""
        best, least, soonest, cramped = -1, inf, inf, False
        for index, letter in self._heads(rank):
            count = self.done[letter]
            arrived = self.arrivals[letter]
            if count >= len(arrived):
                continue
            at = arrived[count]
            if index >= 0 and rank.live + rank.room[index] > rank.most:
                cramped = cramped or at <= now
            elif at > now:
                soonest = min(soonest, at)
            else:
                value = self.period * count + self.offsets[letter]
                if value < least:
                    best, least = letter, value
        if rank.pending:
            weight = 2 * self.problem.stages + rank.stages[rank.pending[0]]
            if len(rank.pending) > rank.delay or (cramped and self.policy.urgent):
                return weight
            wait = self.policy.patience * self.problem.durations[weight]
            if best < 0 and (cramped or soonest - now >= wait):
                return weight
        return best

    def _heads(self, rank: _Rank) -> list[tuple[int, int]]:
        """The letters that might be next: (index of the stage for a forward, else -1; letter)."""
        if not self.policy.strict:
            return rank.letters
        half = len(rank.stages)
        return [
            min(letters, key=self._turn) for letters in (rank.letters[:half], rank.letters[half:])
        ]

    def _turn(self, head: tuple[int, int]) -> float:
        _, letter = head
        count = self.done[letter]
        if count == self.problem.microbatches:
            return inf
        return self.period * count + self.offsets[letter]

    def _begin(self, rank: _Rank, number: int, letter: int, now: float) -> None:
        stages = self.problem.stages
        rank.word.append(letter)
        end = rank.free_at = now + self.problem.durations[letter]
        heappush(self.wakes, (end, number))
        kind, stage = divmod(letter, stages)
        index = rank.stages.index(stage)
        if kind == 2:
            rank.pending.popleft()
            rank.live -= rank.sizes[index]
            return
        self.done[letter] += 1
        if kind == 0:
            rank.live += rank.sizes[index]
        else:
            rank.pending.append(index)
        for fed in self.feeds[letter]:
            arrives = end + self.problem.sources[fed][1]
            self.arrivals[fed].append(arrives)
            heappush(self.wakes, (arrives, self.problem.ranks[fed % stages]))


def _offsets(problem: Problem, policy: Policy, period: float) -> list[float]:
    """When a microbatch comes to each letter of F and I in the policy's pattern."""
    stages, pipeline = problem.stages, problem.pipeline
    backward = reversed(range(stages, 2 * stages))
    now, offsets = 0.0, [0.0] * (2 * stages)
    for step, letter in enumerate((*range(stages), *backward)):
        if step == stages:
            now += policy.gap * period * pipeline / (3 * stages)
        stretch = policy.stretch[step // pipeline]
        now += stretch * problem.sources[letter][1]
        offsets[letter] = now
        now += stretch * problem.durations[letter]
    return offsets
