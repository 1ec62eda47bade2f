"""`megapipe plan` behind its command line: plans of one schedule or many, as text and picture."""

import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from megapipe.config import Config
from megapipe.errors import ConfigError, ScheduleError, UsageError
from megapipe.layout.axes import Axes
from megapipe.layout.estimates import peak_bytes, stage_activation_bytes
from megapipe.layout.family import ModelFamily
from megapipe.layout.layout import Layout, resolve
from megapipe.layout.program import looped_config
from megapipe.layout.world import resolve_axes, with_axes
from megapipe.pipeline.picture import Panel, draw, save_picture
from megapipe.pipeline.schedule import SCHEDULES, Costs, Kind, Timeline, critical_path, simulate
from megapipe.plan.dry_run import layout_lines
from megapipe.plan.program import EstimatedTimes, estimated_times, plan_layout
from megapipe.scratch import scratch_directory

Line = TypeVar("Line")

ACTIONS_LEGEND = "F2: forward of microbatch 2, 12, ... B: backward. I, W: its two parts. "
TABLE_LEGEND = (
    "Bubble: idle time over busy time. Live: microbatches whose activations a rank holds, and an "
    "estimate of their memory; W late: microbatches whose weight gradients are put off; both at "
    "their peak. Sent: tensors in a step. Bytes are those of one tensor rank."
)
MOST_LEGEND = " Each is of the rank that has most."

ROUNDED_TO_0 = 0.005
"""A share that is not worth a word."""


@dataclass(frozen=True)
class Plan:
    """One schedule in one layout, simulated. Bytes are of a tensor rank; lists are by rank."""

    config: Config
    layout: Layout
    timeline: Timeline
    times: EstimatedTimes
    found: list[str]  # which program it is, for auto
    live: list[float]  # the most microbatches whose activations are held at a time
    live_bytes: list[int]  # an estimate
    late: list[float]  # the most microbatches whose weight gradients are put off at a time
    sent: list[int]  # tensors in a step

    @property
    def name(self) -> str:
        return self.config.parallel.schedule

    @property
    def title(self) -> str:
        """A line above its picture."""
        return (
            f"{self.name}: bubble {self.timeline.bubble:.1%}, at most {max(self.live):.3g} "
            f"microbatches live on a rank ({size(max(self.live_bytes))})"
        )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Plans are tuples in lists, without cycles, and the collector would look through all of them
    again and again: 5 of 13 s for all schedules of a trillion parameters on 3,072 ranks."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_without_collector()
def plan(
    config: Config,
    family: ModelFamily,
    wanted: str | None,
    work: tuple[float, float, float] | None,
    world_size: int | None,
    columns: int,
    out: Path | None,
) -> str:
    """What the command prints; `wanted` is a schedule, several between commas, or "all".

    Raises UsageError for a name that is not a schedule, ConfigError or ScheduleError where the one
    schedule asked for does not fit the layout. Of several, those that don't fit are left out, and
    the text says why.
    """
    axes = resolve_axes(config, world_size)
    config = with_axes(config, axes)
    names = schedule_names(wanted, config.parallel.schedule)
    plans, notes = [], []
    for name in names:
        try:
            changed, changes = with_schedule(config, name)
            times = _times(config, changed, axes, family, work)
            plans.append(make_plan(changed, axes, family, times))
            notes += changes
        except (ConfigError, ScheduleError) as error:
            if len(names) == 1:
                raise
            notes.append(f"{name} is left out: {' '.join(str(error).split())}")
    if not plans:
        raise ScheduleError("no schedule fits this layout:\n" + "\n".join(notes))
    plans.sort(key=lambda plan: -plan.timeline.makespan)
    text = _report(plans, notes, columns)
    if out is not None:
        panels = [Panel(plan.title, plan.timeline) for plan in plans]
        save_picture(draw(panels, plans[0].times.unit), out)
        text += f"Picture: {out}\n"
    return text


def schedule_names(wanted: str | None, own: str) -> list[str]:
    """The names in `wanted`, or that of the config. "all" has `auto` where the config has: its
    search takes longer than all else."""
    if wanted is None:
        return [own]
    names: dict[str, None] = {}
    for name in (word.strip() for word in wanted.split(",")):
        if name not in {*SCHEDULES, "auto", "all", own}:
            raise UsageError(
                f"--schedule {wanted}: {name!r} is not a schedule. There are "
                f"{', '.join(SCHEDULES)}, auto, and all."
            )
        names |= dict.fromkeys([*SCHEDULES, own] if name == "all" else [name])
    return list(names)


def with_schedule(config: Config, name: str) -> tuple[Config, list[str]]:
    """The config with that schedule, and what had to be changed for it.

    A schedule that can't have the config's number of chunks on a rank gets the fewest it can have.
    """
    parallel, notes = config.parallel, []
    if name == parallel.schedule:
        return config, []
    fits = name == "auto" or SCHEDULES[name].takes(parallel.virtual)
    virtual = parallel.virtual if fits else SCHEDULES[name].chunks[0]
    layers = parallel.layers_per_stage
    if not fits and layers is not None:
        layers = None
        notes.append(f"{name}: layers are balanced, as parallel.layers_per_stage is for others.")
    changed = parallel.model_copy(
        update={
            "schedule": name,
            "schedule_file": None,
            "stage_costs": None,
            "virtual": virtual,
            "layers_per_stage": layers,
        }
    )
    return Config(**{**dict(config), "parallel": changed}), notes


def _times(
    own: Config,
    config: Config,
    axes: Axes,
    family: ModelFamily,
    work: tuple[float, float, float] | None,
) -> EstimatedTimes:
    """Those of --costs, or of the parallel.stage_costs of the user's `own` config, which must be
    times of the stages that `config` has, or else estimates."""
    if work is not None:
        costs = Costs(*(part / config.parallel.virtual for part in work))
        return EstimatedTimes(costs, "units of --costs", "{:.4g} units".format, "from --costs")
    file, stages = own.parallel.stage_costs, config.parallel.stages
    if file is not None and stages != own.parallel.stages:
        raise ScheduleError(
            f'parallel.stage_costs = "{file}" has the times of '
            f"{own.parallel.stages} stages, and {config.parallel.schedule} has {stages}: "
            "compare it with --costs F,I,W, or with --parallel.stage_costs none."
        )
    return estimated_times(resolve(looped_config(config), axes, family), file)


def make_plan(config: Config, axes: Axes, family: ModelFamily, times: EstimatedTimes) -> Plan:
    """Simulate the config's schedule. Raises ScheduleError for one that exceeds
    parallel.activation_limit."""
    with scratch_directory() as folder:
        layout, found = plan_layout(config, axes, family, folder, times)
    timeline = simulate(layout.program.compute, times.costs)
    sent = _tensors_sent(layout.placement, axes.size("pipeline"))
    held = [stage_activation_bytes(layout, stage) for stage in layout.stages]
    return Plan(
        config=config,
        layout=layout,
        timeline=timeline,
        times=times,
        found=found,
        live=timeline.peak_microbatches,
        live_bytes=peak_bytes(timeline, held),
        late=[count / layout.virtual for count in timeline.peak_pending],
        sent=[count * layout.microbatches for count in sent],
    )


def _tensors_sent(placement: Sequence[int], ranks: int) -> list[int]:
    """For each rank, those of one microbatch: activations forward, gradients back."""
    sent = [0] * ranks
    for here, there in pairwise(placement):
        if here != there:
            sent[here] += 1
            sent[there] += 1
    return sent


# --- Text ----------------------------------------------------------------------------------------


def _report(plans: Sequence[Plan], notes: Sequence[str], columns: int) -> str:
    config, times = plans[0].config, plans[0].times
    out = StringIO()
    console = Console(file=out, width=max(columns, 100), highlight=False, color_system=None)
    print_text = partial(console.print, markup=False)
    layout, schedule = layout_lines(config, plans[0].layout.axes)
    print_text("\n".join([layout, schedule, *plans[0].found] if len(plans) == 1 else [layout]))
    print_text(
        f"{plans[0].layout.microbatches} microbatches of {config.train.micro_batch_size} x "
        f'{config.train.sequence_length} tokens, recompute "{config.train.recompute}". '
        f"Costs: {times.source}. Time: {times.unit}."
    )
    if len(plans) == 1:
        rows = _some(plans[0].timeline.text((columns - 13) // 2).splitlines(), "...")
        print_text("".join(f"{row}\n" for row in ["", *rows]), end="")
        console.print(_ranks(plans[0]))
        print_text(_critical_path(plans[0]))
    console.print(_comparison(plans))
    print_text(ACTIONS_LEGEND + TABLE_LEGEND if len(plans) == 1 else TABLE_LEGEND + MOST_LEGEND)
    if len(plans) > 1:
        notes = [*("\n".join(p.found).replace("Program", p.name, 1) for p in plans), *notes]
    for note in filter(None, notes):
        print_text(note)
    return out.getvalue()


def _comparison(plans: Sequence[Plan]) -> Table:
    """A line for each schedule."""
    table = _columns("schedule", "chunks", "time", "bubble", "live", "memory", "W late", "sent")
    for plan in plans:
        table.add_row(
            plan.name,
            f"{plan.layout.virtual}",
            amount(plan.timeline.makespan),
            f"{plan.timeline.bubble:.1%}",
            f"{max(plan.live):.4g}",
            size(max(plan.live_bytes)),
            f"{max(plan.late):.3g}" if any(plan.late) else "-",
            f"{max(plan.sent):,} x {size(plan.layout.boundary_bytes)}",
        )
    return table


def _ranks(plan: Plan) -> Table:
    """A line for each rank of one schedule."""
    table = _columns("rank", "stages", "bubble", "live", "memory", "W late", "sent")
    rows, bubbles = [], plan.timeline.bubble_per_rank
    for rank, spans in enumerate(plan.timeline.spans):
        stages = sorted({span.action.stage for span in spans})
        rows.append(
            [
                f"{rank}",
                ", ".join(map(str, stages if len(stages) < 5 else [*stages[:3], "..."])),
                f"{bubbles[rank]:.1%}",
                f"{plan.live[rank]:.4g}",
                size(plan.live_bytes[rank]),
                f"{plan.late[rank]:.3g}" if plan.late[rank] else "-",
                f"{plan.sent[rank]:,}",
            ]
        )
    for row in _some(rows, ["..."] * 7):
        table.add_row(*row)
    return table


def _critical_path(plan: Plan) -> str:
    """Whose work the step is as long as: the three ranks that have most of it, and the rest."""
    whole = plan.timeline.makespan
    shares: defaultdict[int, defaultdict[Kind, float]] = defaultdict(lambda: defaultdict(float))
    for rank, span, _ in critical_path(plan.timeline, plan.times.costs.latency):
        shares[rank][span.action.kind] += span.duration / whole
    totals = {rank: sum(kinds.values()) for rank, kinds in shares.items()}
    most = sorted(totals, key=lambda rank: -totals[rank])[:3]
    most = [rank for rank in most if totals[rank] > ROUNDED_TO_0]
    parts = [
        f"rank {rank} {totals[rank]:.0%} "
        f"({', '.join(f'{kind} {share:.0%}' for kind, share in shares[rank].items())})"
        for rank in most
    ]
    rest = {
        "other ranks": sum(totals.values()) - sum(totals[rank] for rank in most),
        "transfers": 1 - sum(totals.values()),
    }
    parts += [f"{name} {share:.0%}" for name, share in rest.items() if share > ROUNDED_TO_0]
    return f"Critical path: {', '.join(parts)}. Only what is on it can make the step shorter."


def _columns(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _some(rows: list[Line], gap: Line) -> list[Line]:
    """All of them, or where there are many the first eight and the last."""
    return rows if len(rows) <= 16 else [*rows[:8], gap, rows[-1]]


def amount(time: float) -> str:
    """`2,203.6`, `33.0`, `0.761`."""
    return f"{time:,.1f}" if time >= 10 else f"{time:.3g}"


def size(count: float) -> str:
    """Three digits: `512 KiB`, `61.3 MiB`, `1.25 GiB`."""
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 0.9995 * 2**power:
            return f"{count / 2**power:.3g} {name}"
    return f"{count:.0f} B"
