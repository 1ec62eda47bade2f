"""The pipeline bubble of each step, measured and planned, without a collective of its own.

Each pipeline rank (the first of those that share its stages) writes when its work began and ended,
how long it worked, and the medians of its stages into slots of the step's one all-reduce. Times
count from the end of the all-reduce before, which all ranks leave within a fraction of a
millisecond of each other (so the first step of a start has no bubble).

The plan is the program simulated with those medians, as in `megapipe.pipeline.comparison`. To
simulate a large program takes seconds, so rank 0 does it when it would cost less than PLAN_SHARE of
the time since it did so last; in between the last result stands.
"""

import math
import time

from megapipe.distributed.mesh import Mesh
from megapipe.pipeline.comparison import measured_costs, median_times
from megapipe.pipeline.recording import Recorder
from megapipe.pipeline.schedule import Kind, Program, compute_only, simulate
from megapipe.pipeline.schedule.action import stage_ranks
from megapipe.step_sums import Given, StepPart, StepSums, Totals

PLAN_SHARE = 0.002
_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


class BubbleMeter(StepPart):
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
        self._slots = 3 * mesh.pipeline.size + len(_KINDS) * self._stages

    def register(self, sums: StepSums) -> None:
        sums.register("bubble", self._slots)

    def given(self) -> dict[str, Given]:
        """What this rank writes into the slots.

        Reads the last run, so on a GPU it waits until the last action of the pipeline is done.
        """
        if not self._mesh.leads_stages:
            return {}
        values = [0.0] * self._slots
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
        return {"bubble": values}

    def reduced(self) -> None:
        self._common = time.perf_counter()

    def measured(self, totals: Totals) -> float | None:
        """Idle time over busy time in the step of these totals; None in the first of a start."""
        size, sums = self._mesh.pipeline.size, totals.all("bubble")
        begins, ends, busy = (sums[index : 3 * size : 3] for index in range(3))
        if math.isnan(sum(begins)) or sum(busy) == 0:
            return None
        return size * (max(ends) - min(begins)) / sum(busy) - 1

    def planned(self, totals: Totals) -> float | None:
        """The bubble of the simulated program; on rank 0 only."""
        if self._mesh.rank != 0:
            return None
        now = time.perf_counter()
        if self._planned_for > PLAN_SHARE * (now - self._planned_at):
            return self._planned
        base = 3 * self._mesh.pipeline.size
        medians = {
            (stage, kind): totals.all("bubble")[base + len(_KINDS) * stage + index]
            for stage in range(self._stages)
            for index, kind in enumerate(_KINDS)
        }
        self._planned = simulate(self._program, measured_costs(medians, self._stages)).bubble
        self._planned_at = time.perf_counter()
        self._planned_for = self._planned_at - now
        return self._planned
