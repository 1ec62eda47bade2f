"""Programs as list scheduling and the search work on them: for each rank a word of letters.

Microbatches are alike, so at every stage they may as well pass in order (sorting the times of the
forwards of a stage changes neither when the stage works nor what it holds). A program is then no
more than which stage does what next: letter `kind * stages + stage`, and its k-th occurrence is
microbatch k. Times of a word take a few additions for each letter, which is what makes thousands of
tries affordable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

from megapipe.pipeline.schedule.action import Action, Kind, Program, sequential
from megapipe.pipeline.schedule.limit import Limit
from megapipe.pipeline.schedule.simulate import Costs

KINDS = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.BACKWARD)
F, I, W, B = range(4)  # noqa: E741
Word = list[int]
Words = list[Word]


@dataclass(frozen=True)
class SchedulingProblem:
    """What is to be ordered: `ranks` holds the rank of each stage."""

    ranks: tuple[int, ...]
    microbatches: int
    costs: Costs
    limit: Limit

    @property
    def stages(self) -> int:
        return len(self.ranks)

    @property
    def pipeline(self) -> int:
        return max(self.ranks) + 1

    @cached_property
    def own(self) -> list[list[int]]:
        """The stages of each rank, in order."""
        own: list[list[int]] = [[] for _ in range(self.pipeline)]
        for stage, rank in enumerate(self.ranks):
            own[rank].append(stage)
        return own

    @cached_property
    def durations(self) -> list[float]:
        """Of each letter."""
        return [
            self.costs.of(Action(stage, kind, 0)) for kind in KINDS for stage in range(self.stages)
        ]

    @cached_property
    def sources(self) -> list[tuple[int, float]]:
        """For each letter of F and I: the letter whose result it waits for (-1: none), and how
        long that is under way."""
        last, costs = self.stages - 1, self.costs
        found = []
        for stage in range(self.stages):
            before = stage - 1
            crosses = before >= 0 and self.ranks[before] != self.ranks[stage]
            found.append((before, costs.latency if crosses else 0.0))
        for stage in range(self.stages):
            after = stage + 1
            crosses = after <= last and self.ranks[after] != self.ranks[stage]
            source = self.stages + after if after <= last else last
            found.append((source, costs.latency if crosses else 0.0))
        return found

    @cached_property
    def work(self) -> list[float]:
        """Time that each rank computes for one microbatch."""
        return [
            sum(self.durations[kind * self.stages + stage] for kind in (F, I, W) for stage in own)
            for own in self.own
        ]

    @cached_property
    def offsets(self) -> list[float]:
        """For each letter of F and I: when a microbatch alone in the pipeline would come to it."""
        now, offsets = 0.0, [0.0] * (2 * self.stages)
        for letter in (*range(self.stages), *reversed(range(self.stages, 2 * self.stages))):
            now += self.sources[letter][1]
            offsets[letter] = now
            now += self.durations[letter]
        return offsets

    @cached_property
    def bound(self) -> float:
        """No order is faster: a rank can't begin before its first stage's input is there, nor be
        done before it has done all its work; and one microbatch goes all the way."""
        ranks = zip(self.own, self.work, strict=True)
        busiest = max(self.offsets[own[0]] + self.microbatches * work for own, work in ranks)
        first = self.stages  # the letter of stage 0's input gradient
        alone = self.offsets[first] + self.durations[first] + self.durations[first + self.stages]
        return max(busiest, alone)


def to_words(program: Program, stages: int) -> Words:
    """The program's words. Its microbatches must pass every stage in order."""
    number = {kind: index * stages for index, kind in enumerate(KINDS)}
    return [
        [number[action.kind] + action.stage for action in actions]
        for actions in sequential(program)
    ]


def to_program(words: Words, stages: int) -> Program:
    """The program of the words."""
    program: Program = []
    for word in words:
        seen = [0] * (len(KINDS) * stages)
        actions = []
        for letter in word:
            kind, stage = divmod(letter, stages)
            if kind == B:  # counts as both of its halves
                letter = I * stages + stage
                seen[W * stages + stage] += 1
            actions.append(Action(stage, KINDS[kind], seen[letter]))
            seen[letter] += 1
        program.append(actions)
    return program


def split(words: Words, stages: int) -> Words:
    """The words with each full backward as its two halves, which is never slower."""
    halves = {B * stages + s: [I * stages + s, W * stages + s] for s in range(stages)}
    return [[part for letter in word for part in halves.get(letter, [letter])] for word in words]


def join_first(words: Words, stages: int) -> Words:
    """The words with stage 0's halves as one where one follows the other: nobody waits for the
    input gradient of stage 0, and one action costs the runtime less than two."""
    half, other, whole = I * stages, W * stages, B * stages
    joined = []
    for word in words:
        result: Word = []
        ahead = 0  # input gradients whose weight gradients are still to come
        for letter in word:
            if letter == other and ahead == 1 and result[-1] == half:
                result[-1], ahead = whole, 0
                continue
            ahead += (letter == half) - (letter == other)
            result.append(letter)
        joined.append(result)
    return joined


def makespan(problem: SchedulingProblem, words: Sequence[Word]) -> float:
    """When all is done, as `simulate` tells it; infinite for words that never finish."""
    stages, durations, sources = problem.stages, problem.durations, problem.sources
    ends: list[list[float]] = [[] for _ in range(2 * stages)]
    # A full backward ends where others look for the input gradient.
    role = [*range(2 * stages), *[-1] * stages, *range(stages, 2 * stages)]
    waiting = [-1] * (2 * stages)  # which rank waits for the next end of a letter
    position, free = [0] * len(words), [0.0] * len(words)
    ready = list(range(len(words)))
    while ready:
        rank = ready.pop()
        word, now = words[rank], free[rank]
        for index in range(position[rank], len(word)):
            letter = word[index]
            own = role[letter]
            if own < 0:
                now += durations[letter]
                continue
            source, latency = sources[own]
            if source >= 0:
                count = len(ends[own])
                if count >= len(ends[source]):
                    waiting[source] = rank
                    position[rank] = index
                    break
                arrived = ends[source][count] + latency
                if arrived > now:
                    now = arrived
            now += durations[letter]
            ends[own].append(now)
            if waiting[own] >= 0:
                ready.append(waiting[own])
                waiting[own] = -1
        else:
            position[rank] = len(word)
        free[rank] = now
    done = all(at == len(word) for at, word in zip(position, words, strict=True))
    return max(free) if done else inf


def peaks(problem: SchedulingProblem, words: Sequence[Word]) -> list[float]:
    """The most that each rank holds, in the unit of the limit."""
    stages, sizes = problem.stages, problem.limit.sizes
    found = []
    for word in words:
        live = most = 0.0
        for letter in word:
            kind, stage = divmod(letter, stages)
            if kind == F:
                live += sizes[stage]
                most = max(most, live)
            elif kind != I:
                live -= sizes[stage]
        found.append(most)
    return found
