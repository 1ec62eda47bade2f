"""When each action of each rank began and ended, simulated or recorded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

from megapipe.pipeline.schedule.action import COMPUTE, LAST_OF_A_BACKWARD, Action, Kind

_F, _I, _W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT
"""To look one up takes as long as the rest of a loop over actions."""

KEPT_STEPS = 8
"""Training steps of which each rank remembers its spans."""


class Span(NamedTuple):
    """An action and its time, from when all that it waits for was there."""

    action: Action
    begin: float
    end: float

    @property
    def duration(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Timeline:
    """For each rank its spans in order, in whatever unit of time made them."""

    spans: list[list[Span]]

    @property
    def makespan(self) -> float:
        begin = min((spans[0].begin for spans in self.spans if spans), default=0.0)
        return max((spans[-1].end for spans in self.spans if spans), default=begin) - begin

    @property
    def bubble(self) -> float:
        """Idle time over busy time, all ranks together: time / ideal - 1, where the ideal shares
        the work equally among the ranks and never waits."""
        busy = sum(rank.busy for rank in self._totals)
        return (len(self.spans) * self.makespan - busy) / busy

    @property
    def bubble_per_rank(self) -> list[float]:
        """For each rank its idle time over its busy time, until the last rank is done."""
        makespan = self.makespan
        return [makespan / rank.busy - 1 if rank.busy else inf for rank in self._totals]

    @property
    def peak_live(self) -> list[int]:
        """For each rank, the most activations it ever holds, in chunks of one microbatch.

        An activation lives from the begin of its forward to the end of its backward, or of the
        weight gradient where that is apart. In forward-only programs none outlives its forward.
        """
        return [rank.peak_live for rank in self._totals]

    @property
    def peak_microbatches(self) -> list[float]:
        """`peak_live` in microbatches of a full rank, all of its chunks."""
        return [rank.peak_live / (rank.stages or 1) for rank in self._totals]

    @property
    def peak_pending(self) -> list[int]:
        """For each rank, the most weight gradients that ever are still to be computed, in chunks of
        one microbatch: input gradients done without theirs."""
        return [rank.peak_pending for rank in self._totals]

    @cached_property
    def _totals(self) -> "list[_Totals]":
        return list(map(_totals, self.spans))

    def text(self, columns: int = 48) -> str:
        """A picture: a row for each rank, two characters for the time of the shortest action.

        `F3` is a forward of microbatch 3 (of 13, 23 and so on: one digit), `B3--` a backward twice
        as long, dots are idle time. What comes after `columns` shortest actions is cut off.
        """
        computing = [_computing(spans) for spans in self.spans]
        begin = min((spans[0].begin for spans in computing if spans), default=0.0)
        unit = min((s.duration for spans in computing for s in spans if s.duration > 0), default=1)
        rows = []
        for rank, spans in enumerate(computing):
            cells = [".."] * min(columns, round(self.makespan / unit))
            for action, start, end in spans:
                first = round((start - begin) / unit)
                last = max(first + 1, min(len(cells), round((end - begin) / unit)))
                marks = [f"{action.kind}{action.microbatch % 10}"] + ["--"] * (last - first - 1)
                cells[first:last] = marks[: max(0, len(cells) - first)]
            cut = " ..." if columns < round(self.makespan / unit) else ""
            rows.append(f"rank {rank:<3}{''.join(cells)}{cut}\n")
        return "".join(rows)


def _computing(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.action.kind in COMPUTE]


class _Totals(NamedTuple):
    """Of one rank."""

    busy: float
    stages: int
    peak_live: int
    peak_pending: int


def _totals(spans: list[Span]) -> _Totals:
    """A large plan has millions of spans, and each pass over them is time."""
    busy, stages = 0.0, set[int]()
    pending = most_pending = 0
    for (stage, kind, _, _), begin, end in spans:
        if kind in COMPUTE:
            busy += end - begin
            stages.add(stage)
        if kind is _I:
            pending += 1
            if pending > most_pending:
                most_pending = pending
        elif kind is _W:
            pending -= 1
    live = max(live_during([span.action for span in spans]), default=0)
    return _Totals(busy, len(stages), live, most_pending)


def live_during(actions: Sequence[Action]) -> Iterator[int]:
    """For each action of a rank, how many activations are live while it runs (see `peak_live`)."""
    live = 0
    keeps = any(action.kind in LAST_OF_A_BACKWARD for action in actions)
    for _, kind, _, _ in actions:
        if kind is _F:
            live += 1
        yield live
        if kind in LAST_OF_A_BACKWARD or (kind is _F and not keeps):
            live -= 1
