"""List scheduling: ranks that always do what comes first in a pattern among what they can do now.

The pattern says when microbatches would come to each stage; the simulation says what that order
takes with given costs and within a limit of memory. Building blocks (V-Half, V-Min) have their
pattern from a paper, the search makes hundreds from the costs.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from megapipe.pipeline.schedule.words import SchedulingProblem, Word, Words


@dataclass(frozen=True)
class Pattern:
    """Microbatch m comes to a letter of F or I at `period * m + offsets[letter]`."""

    period: float
    offsets: Sequence[float]


@dataclass(frozen=True)
class Rules:
    """What a rank does, besides following its pattern.

    Of the actions that could begin, the first in the pattern is taken; with `strict`, forwards are
    done in the order of the pattern, and so are input gradients.

    Weight gradients fill the time in which there is nothing else, but

    - one is done at once where more than `delay` (times the rank's number, with `by_rank`) wait,
      or, with `urgent`, where a forward could begin if there were memory for it;
    - none is begun where something else arrives within `patience` times its duration.

    Rank r has at most `ahead * (p - r)` of what one microbatch takes live, if that is below the
    limit.
    """

    strict: bool = False
    delay: float = inf
    by_rank: bool = False
    urgent: bool = False
    patience: float = 0.0
    ahead: float = inf

    def __str__(self) -> str:
        words = ["strict"] * self.strict
        if self.delay < inf:
            words.append(f"delay {self.delay:g}" + " * rank" * self.by_rank)
        words += ["urgent"] * self.urgent
        words += [f"patience {self.patience:g}"] * (self.patience > 0)
        words += [f"ahead {self.ahead:g}"] * (self.ahead < inf)
        return ", ".join(words)


PLAIN = Rules()


def list_schedule(
    problem: SchedulingProblem, pattern: Pattern, rules: Rules = PLAIN
) -> Words | None:
    """The words that ranks with this pattern and these rules write, within the limit.

    None where a strict order can't go on in the memory that there is. Without `strict` that does
    not happen if the limit allows one microbatch: before a rank lets a microbatch into one of its
    stages, it has room for it at all stages that are still to come, so that the first microbatch
    under way never waits for memory.
    """
    return _Ranks(problem, pattern, rules).run()


class _Rank:
    """One rank's work and memory. Lists over its stages."""

    def __init__(
        self, problem: SchedulingProblem, pattern: Pattern, rules: Rules, rank: int
    ) -> None:
        self.stages = problem.own[rank]
        sizes = [problem.limit.sizes[stage] for stage in self.stages]
        self.sizes = sizes
        self.letters = [
            *enumerate(self.stages),
            *((-1, problem.stages + stage) for stage in self.stages),
        ]
        """Of F and I, with the index of the stage for a forward, else -1."""
        self.room = [sum(sizes[index:]) for index in range(len(sizes))]
        """What a forward must find free: its own size and that of the rank's later stages."""
        ahead = max(1.0, rules.ahead * (problem.pipeline - rank)) * self.room[0]
        self.most = min(problem.limit.ceiling, ahead * (1 + 1e-9))
        self.orders: tuple[list[tuple[int, int]], ...] = ()
        """With a strict order: what of F and of I is still to do, backwards, as `letters`."""
        if rules.strict:
            self.room = sizes
            self.orders = tuple(
                _in_order(half, problem.microbatches, pattern)
                for half in (self.letters[: len(sizes)], self.letters[len(sizes) :])
            )
        self.delay = rules.delay * rank if rules.by_rank else rules.delay
        self.pending: deque[int] = deque()  # stages (as indices) whose weight gradients wait
        self.live = 0.0
        self.free_at = 0.0
        self.word: Word = []


def _in_order(
    letters: list[tuple[int, int]], microbatches: int, pattern: Pattern
) -> list[tuple[int, int]]:
    """Each of the letters once for every microbatch, the last of the pattern first."""
    turns = [
        (pattern.period * count + pattern.offsets[letter], place)
        for place, (_, letter) in enumerate(letters)
        for count in range(microbatches)
    ]
    return [letters[place] for _, place in sorted(turns, reverse=True)]


class _Ranks:
    def __init__(self, problem: SchedulingProblem, pattern: Pattern, rules: Rules) -> None:
        self.problem, self.rules = problem, rules
        self.period, self.offsets = pattern.period, pattern.offsets
        stages = problem.stages
        self.ranks = [_Rank(problem, pattern, rules, rank) for rank in range(problem.pipeline)]
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
        heads = rank.letters  # the letters that might be next
        if self.rules.strict:
            heads = [order[-1] for order in rank.orders if order]
        for index, letter in heads:
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
            if len(rank.pending) > rank.delay or (cramped and self.rules.urgent):
                return weight
            wait = self.rules.patience * self.problem.durations[weight]
            if best < 0 and (cramped or soonest - now >= wait):
                return weight
        return best

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
        if self.rules.strict:
            rank.orders[kind].pop()
        if kind == 0:
            rank.live += rank.sizes[index]
        else:
            rank.pending.append(index)
        for fed in self.feeds[letter]:
            arrives = end + self.problem.sources[fed][1]
            self.arrivals[fed].append(arrives)
            heappush(self.wakes, (arrives, self.problem.ranks[fed % stages]))
