"""`logging.timeline`: the recorded steps of all pipeline ranks, gathered and written on rank 0.

    timeline.png     the plan above reality, on one scale of time
    timeline.json    a Chrome trace of the plan and of all steps asked for
    timeline.txt     where the difference between the two went

Where several steps are asked for, the picture and the tables show the one of median length: the
first steps of a run, and single disturbed ones, tell little. Steps are gathered after the last of
them, so that writing disturbs none.
"""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megapipe.amounts import counted
from megapipe.config.logging import parse_steps
from megapipe.distributed.mesh import Mesh
from megapipe.files import replace_durably
from megapipe.pipeline.clocks import clock_offsets
from megapipe.pipeline.comparison import Comparison, ComparisonRow, Reality, compare
from megapipe.pipeline.picture import Panel, draw, save_picture
from megapipe.pipeline.recording import Moment, ProgramRun, Recorder
from megapipe.pipeline.schedule import Program, Span, Timeline
from megapipe.pipeline.trace import chrome_trace

_WIDTH = 100
"""Characters of the tables."""


class TimelineWriter:
    """Writes the steps `asked` (as logging.timeline has them) into `run_dir` when they are done.

    `program` is the lowered program that `recorder` records on this rank. On rank 0 `say` is told
    the tables, and `show` the picture and its step.
    """

    def __init__(
        self,
        asked: str,
        *,
        mesh: Mesh,
        program: Program,
        recorder: Recorder,
        schedule: str,
        run_dir: Path,
        say: Callable[[str], None],
        show: Callable[[Path, int], None],
    ) -> None:
        self.steps = parse_steps(asked)
        self._mesh, self._program, self._recorder = mesh, program, recorder
        self._schedule, self._run_dir = schedule, run_dir
        self._say, self._show = say, show
        self._seen = 0

    def after(self, step: int) -> None:
        """Call it after each step. Collective after the last one asked for."""
        self._seen += step in self.steps
        if step != self.steps[-1] or self._seen == 0:
            return
        if not self._mesh.leads_stages:
            return
        gathered = gather_steps(self._mesh, self._program, self._recorder, step, self._seen)
        if self._mesh.rank != 0:
            return
        try:
            self._write(gathered)
        except Exception as error:  # what a run tells must not end it
            self._say(f"The timeline could not be written ({error}); the run goes on without it.")

    def _write(self, steps: list[Reality]) -> None:
        by_length = sorted(steps, key=lambda reality: reality.work().makespan)
        comparison = compare(by_length[len(steps) // 2])
        text = report(comparison, self._schedule)
        trace = chrome_trace(comparison.plan, [(one.step, absolute(one)) for one in steps])
        replace_durably(self._run_dir / "timeline.txt", [text.encode()])
        replace_durably(self._run_dir / "timeline.json", [json.dumps(trace).encode()])
        path = self._run_dir / "timeline.png"
        save_picture(draw(panels(comparison, self._schedule)), path)
        self._say(f"{text}Timeline of step {comparison.step}: {path}, .txt and .json (Perfetto)")
        self._show(path, comparison.step)


def gather_steps(
    mesh: Mesh, program: Program, recorder: Recorder, step: int, count: int
) -> list[Reality]:
    """The last `count` steps, of which `step` is the last, on the clock of pipeline rank 0.

    Collective over the pipeline; ranks other than its first get an empty list.
    """
    runs = [recorder.run(ago) for ago in reversed(range(count))]
    steps = range(step - count + 1, step + 1)
    if mesh.pipeline.group is None:
        return [Reality(at, program, [run]) for at, run in zip(steps, runs, strict=True)]
    offsets = clock_offsets(mesh.pipeline, mesh.device)
    offset, error = offsets[mesh.pipeline.rank].seconds, max(one.error for one in offsets)
    shifted = [
        [run.entered - offset, *(time - offset for moment in run.moments for time in moment)]
        for run in runs
    ]
    ranks = mesh.pipeline.rank_group.gather(shifted)
    if ranks is None:
        return []
    return [
        Reality(at, program, [_run(rank[index]) for rank in ranks], error)
        for index, at in enumerate(steps)
    ]


def _run(times: list[float]) -> ProgramRun:
    entered, *rest = times
    return ProgramRun(entered, [Moment(*rest[i : i + 3]) for i in range(0, len(rest), 3)])


def absolute(reality: Reality) -> Timeline:
    """Its compute actions at the times of the first rank's clock."""
    return Timeline(
        [
            [
                Span(action, moment.ready, moment.ended)
                for action, moment in zip(actions, run.moments, strict=True)
                if action.kind.computes
            ]
            for actions, run in zip(reality.program, reality.runs, strict=True)
        ]
    )


# --- What people read ----------------------------------------------------------------------------


def panels(comparison: Comparison, schedule: str) -> list[Panel]:
    """The plan above reality."""
    plan, real = comparison.plan, comparison.real
    return [
        Panel(f"plan ({schedule}): {_seconds(plan.makespan)}, bubble {plan.bubble:.1%}", plan),
        Panel(f"step {comparison.step}: {_seconds(real.makespan)}, bubble {real.bubble:.1%}", real),
    ]


def report(comparison: Comparison, schedule: str) -> str:
    """The tables of timeline.txt."""
    plan, real = comparison.plan, comparison.real
    out = StringIO()
    console = Console(file=out, width=_WIDTH, highlight=False, color_system=None)
    console.print(
        f"Step {comparison.step}, {schedule} on {counted(len(real.spans), 'rank')}: "
        f"{_seconds(real.makespan)} in the pipeline, bubble {real.bubble:.1%}. Planned with the "
        f"same stages: {_seconds(plan.makespan)}, bubble {plan.bubble:.1%}. With equal stages the "
        f"schedule has a bubble of {comparison.equal_bubble:.1%}.",
        markup=False,
    )
    console.print(_parts(comparison))
    console.print(_ranks(comparison))
    return out.getvalue()


def _parts(comparison: Comparison) -> Table:
    table = Table("where the time went")
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("of the plan", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    planned = comparison.plan.makespan

    def add(row: ComparisonRow, sign: str) -> None:
        share = f"{row.seconds / planned:{sign}.1%}"
        table.add_row(row.label, f"{1e3 * row.seconds:{sign},.2f}", share, row.note)

    for row in comparison.plan_rows:
        add(row, "")
    table.add_section()
    add(ComparisonRow("the plan", planned), "")
    table.add_section()
    for row in comparison.reality_rows:
        add(row, "+")
    table.add_section()
    add(ComparisonRow("reality", comparison.real.makespan), "")
    return table


def _ranks(comparison: Comparison) -> Table:
    table = Table("ms of each rank")
    for name in ("work planned", "work", "waits for tensors", "executor", "not yet or done"):
        table.add_column(name, justify="right")
    for rank in comparison.ranks:
        times = (rank.planned_work, rank.work, rank.waits, rank.between, rank.outside)
        table.add_row(f"rank {rank.rank}", *(f"{1e3 * seconds:,.2f}" for seconds in times))
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 10 else f"{1e3 * seconds:,.1f} ms"
