"""The pipeline bubble of each step, measured and planned, without a collective of its own.

Each pipeline rank (the first of those that share its stages) adds to the sums of the step when its
work began and ended, how long it worked, and the median time of each kind of action at its stages.
Times count from the end of the all-reduce before, which all ranks leave within a fraction of a
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

BEGAN, ENDED, BUSY = "bubble.began", "bubble.ended", "bubble.busy"
"""Quantities with a place for each pipeline rank, in seconds."""
MEDIANS = {
    kind: f"bubble.median.{kind}"
    for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
}
"""By kind of action, quantities with a place for each stage, in seconds."""


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

    def register(self, sums: StepSums) -> None:
        for name in (BEGAN, ENDED, BUSY):
            sums.register(name, self._mesh.pipeline.size)
        for name in MEDIANS.values():
            sums.register(name, self._stages)

    def given(self) -> dict[str, Given]:
        """Times at the place of this pipeline rank, medians at the places of its stages.

        Reads the last run, so on a GPU it waits until the last action of the pipeline is done.
        """
        if not self._mesh.leads_stages:
            return {}
        spans = [span for span in self._recorder.spans() if span.action.kind.computes]
        rank = self._mesh.pipeline.rank
        medians: dict[str, dict[int, float]] = {name: {} for name in MEDIANS.values()}
        for (stage, kind), seconds in median_times(spans).items():
            medians[MEDIANS[kind]][stage] = seconds
        return {
            BEGAN: {rank: spans[0].begin - self._common},
            ENDED: {rank: spans[-1].end - self._common},
            BUSY: {rank: sum(span.duration for span in spans)},
            **medians,
        }

    def reduced(self) -> None:
        self._common = time.perf_counter()

    def measured(self, totals: Totals) -> float | None:
        """Idle time over busy time in the step of these totals; None in the first of a start."""
        began, ended, busy = (totals.all(name) for name in (BEGAN, ENDED, BUSY))
        if math.isnan(sum(began)) or sum(busy) == 0:
            return None
        return len(busy) * (max(ended) - min(began)) / sum(busy) - 1

    def planned(self, totals: Totals) -> float | None:
        """The bubble of the simulated program; on rank 0 only."""
        if self._mesh.rank != 0:
            return None
        now = time.perf_counter()
        if self._planned_for > PLAN_SHARE * (now - self._planned_at):
            return self._planned
        medians = {
            (stage, kind): seconds
            for kind, name in MEDIANS.items()
            for stage, seconds in enumerate(totals.all(name))
        }
        self._planned = simulate(self._program, measured_costs(medians, self._stages)).bubble
        self._planned_at = time.perf_counter()
        self._planned_for = self._planned_at - now
        return self._planned
