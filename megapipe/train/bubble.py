"""The pipeline bubble of each step, measured and planned, without a collective of its own.

Each pipeline rank (of data 0 and tensor 0) writes when its work began and ended, how long it
worked, and the medians of its stages into slots of the step's one all-reduce. Times count from the
end of the all-reduce before, which all ranks leave within a fraction of a millisecond of each other
(so the first step of a start has no bubble).

The plan is the program simulated with those medians, as in `megapipe.pipeline.comparison`. To
simulate a large program takes seconds, so rank 0 does it when it would cost less than PLAN_SHARE of
the time since it did so last; in between the last result stands.
"""

import math
import time
from collections.abc import Sequence

from megapipe.distributed.mesh import Mesh
from megapipe.pipeline.comparison import measured_costs, median_times
from megapipe.pipeline.recording import Recorder
from megapipe.pipeline.schedule import Kind, Program, compute_only, simulate
from megapipe.pipeline.schedule.action import stage_ranks

PLAN_SHARE = 0.002
_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


class BubbleMeter:
    """One rank's share of measuring; `program` is the lowered one that `recorder` records."""

    def __init__(self, mesh: Mesh, program: Program, recorder: Recorder) -> None:
        self._mesh = mesh
        self._program = compute_only(program)
        self._stages = len(stage_ranks(program))
        self._recorder = recorder
        self._common = math.nan  # this rank's clock when the last all-reduce ended
        self._planned_at = -math.inf
        self._planned_for = 0.0  # seconds that it took
        self._planned: float | None = None
        self.slots = 3 * mesh.pipeline.size + len(_KINDS) * self._stages

    def values(self) -> list[float]:
        """What this rank writes into the slots, to be summed over all ranks; after each step.

        Reads the last run, so on a GPU it waits until that is done.
        """
        values = [0.0] * self.slots
        if not (self._mesh.data.is_first and self._mesh.tensor.is_first):
            return values
        spans = [span for span in self._recorder.spans() if span.action.kind.computes]
        first = 3 * self._mesh.pipeline.rank
        values[first : first + 3] = [
            spans[0].begin - self._common,
            spans[-1].end - self._common,
            sum(span.duration for span in spans),
        ]
        base = 3 * self._mesh.pipeline.size
        for (stage, kind), seconds in median_times(spans).items():
            values[base + len(_KINDS) * stage + _KINDS.index(kind)] = seconds
        return values

    def synchronized(self) -> None:
        """Call it when the all-reduce of a step (or of a validation) has ended."""
        self._common = time.perf_counter()

    def measured(self, totals: Sequence[float]) -> float | None:
        """Idle time over busy time in the step whose slots were summed to `totals`."""
        size = self._mesh.pipeline.size
        begins, ends, busy = (totals[index : 3 * size : 3] for index in range(3))
        if math.isnan(sum(begins)) or sum(busy) == 0:
            return None
        return size * (max(ends) - min(begins)) / sum(busy) - 1

    def planned(self, totals: Sequence[float]) -> float | None:
        """The bubble of the simulated program; not the same on all ranks."""
        now = time.perf_counter()
        if self._planned_for > PLAN_SHARE * (now - self._planned_at):
            return self._planned
        base = 3 * self._mesh.pipeline.size
        medians = {
            (stage, kind): totals[base + len(_KINDS) * stage + index]
            for stage in range(self._stages)
            for index, kind in enumerate(_KINDS)
        }
        self._planned = simulate(self._program, measured_costs(medians, self._stages)).bubble
        self._planned_at = time.perf_counter()
        self._planned_for = self._planned_at - now
        return self._planned
