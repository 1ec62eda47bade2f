"""When each action of each rank began and ended, simulated or recorded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import NamedTuple

from megapipe.pipeline.schedule.action import LAST_OF_A_BACKWARD, Action, Kind

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
        busy = sum(span.duration for spans in self.spans for span in _computing(spans))
        return (len(self.spans) * self.makespan - busy) / busy

    @property
    def bubble_per_rank(self) -> list[float]:
        """For each rank its idle time over its busy time, until the last rank is done."""
        makespan = self.makespan
        busy = [sum(span.duration for span in _computing(spans)) for spans in self.spans]
        return [makespan / time - 1 if time else inf for time in busy]

    @property
    def peak_live(self) -> list[int]:
        """For each rank, the most activations it ever holds, in chunks of one microbatch.

        An activation lives from the begin of its forward to the end of its backward, or of the
        weight gradient where that is apart. In forward-only programs none outlives its forward.
        """
        return [max(live_during(_actions(spans)), default=0) for spans in self.spans]

    @property
    def peak_microbatches(self) -> list[float]:
        """`peak_live` in microbatches of a full rank, all of its chunks."""
        stages = [len({span.action.stage for span in _computing(spans)}) for spans in self.spans]
        return [live / (count or 1) for live, count in zip(self.peak_live, stages, strict=True)]

    @property
    def peak_pending(self) -> list[int]:
        """For each rank, the most weight gradients that ever are still to be computed, in chunks of
        one microbatch: input gradients done without theirs."""
        peaks = []
        for spans in self.spans:
            steps = (_PENDING.get(span.action.kind, 0) for span in spans)
            peaks.append(max(accumulate(steps), default=0))
        return peaks

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
                last = max(first + 1, round((end - begin) / unit))
                marks = [f"{action.kind}{action.microbatch % 10}"] + ["--"] * (last - first - 1)
                cells[first:last] = marks[: max(0, len(cells) - first)]
            cut = " ..." if columns < round(self.makespan / unit) else ""
            rows.append(f"rank {rank:<3}{''.join(cells)}{cut}\n")
        return "".join(rows)


def _computing(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.action.kind.computes]


def _actions(spans: list[Span]) -> list[Action]:
    return [span.action for span in spans]


_PENDING = {Kind.BACKWARD_INPUT: 1, Kind.BACKWARD_WEIGHT: -1}


def live_during(actions: Sequence[Action]) -> Iterator[int]:
    """For each action of a rank, how many activations are live while it runs (see `peak_live`)."""
    live = 0
    keeps = any(action.kind in LAST_OF_A_BACKWARD for action in actions)
    for action in actions:
        if action.kind is Kind.FORWARD:
            live += 1
        yield live
        if action.kind in LAST_OF_A_BACKWARD or (action.kind is Kind.FORWARD and not keeps):
            live -= 1
