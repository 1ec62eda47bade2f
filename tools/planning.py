"""`megapipe plan` behind its command line: plans of one schedule or many, as text and picture."""

import gc
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

from megapipe.config import Config, check_layout
from megapipe.errors import ConfigError, ScheduleError
from megapipe.models.activations import peak_bytes, stage_bytes
from megapipe.models.partition import stages
from megapipe.models.stage_costs import Work, equal_costs, stage_costs
from megapipe.pipeline.picture import Panel, draw, save
from megapipe.pipeline.program import (
    boundary_bytes,
    microbatches,
    stage_placement,
    training_program,
    with_program,
)
from megapipe.pipeline.schedule import SCHEDULES, Timeline, simulate
from megapipe.tools.arguments import UsageError
from megapipe.tools.dry_run import layout_lines

Line = TypeVar("Line")

FLOPS_UNIT = "forward of one microbatch through a rank's share of the layers = 1"


@dataclass(frozen=True)
class Plan:
    """One schedule in one layout, simulated. Bytes are of a tensor rank; lists are by rank."""

    name: str
    virtual: int
    timeline: Timeline
    live: list[float]  # the most microbatches whose activations are held at a time
    live_bytes: list[int]  # an estimate
    late: list[float]  # the most microbatches whose weight gradients are put off at a time
    sent: list[int]  # tensors in a step
    tensor_bytes: int

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
    parallel = config.parallel
    fewest = parallel.tensor * parallel.pipeline * (parallel.data or 1)
    config = check_layout(config, world_size or fewest)
    names = schedule_names(wanted, parallel.schedule)
    plans, notes = [], []
    for name in names:
        try:
            changed, changes = with_schedule(config, name)
            plans.append(make_plan(changed, work))
            notes += changes
        except (ConfigError, ScheduleError) as error:
            if len(names) == 1:
                raise
            notes.append(f"{name} is left out: {' '.join(str(error).split())}")
    if not plans:
        raise ScheduleError("no schedule fits this layout:\n" + "\n".join(notes))
    plans.sort(key=lambda plan: -plan.timeline.makespan)
    unit = FLOPS_UNIT if work is None else "units of --costs"
    text = _report(config, plans, notes, unit, columns)
    if out is not None:
        save(draw([Panel(plan.title, plan.timeline) for plan in plans], unit), out)
        text += f"Picture: {out}\n"
    return text


def schedule_names(wanted: str | None, own: str) -> list[str]:
    """The names in `wanted`, or that of the config."""
    if wanted is None:
        return [own]
    if wanted == "all":
        return [*SCHEDULES, *([own] if own not in SCHEDULES else [])]
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    for name in names:
        if name not in SCHEDULES and name != own:
            raise UsageError(
                f"--schedule {wanted}: {name!r} is not a schedule. There are "
                f"{', '.join(SCHEDULES)}, and all."
            )
    return names


def with_schedule(config: Config, name: str) -> tuple[Config, list[str]]:
    """The config with that schedule, and what had to be changed for it.

    A schedule that can't have the config's number of chunks on a rank gets the fewest it can have.
    """
    parallel, notes = config.parallel, []
    if name == parallel.schedule:
        return config, []
    fits = SCHEDULES[name].takes(parallel.virtual)
    virtual = parallel.virtual if fits else SCHEDULES[name].chunks[0]
    layers = parallel.layers_per_stage
    if not fits and layers is not None:
        layers = None
        notes.append(f"{name}: layers are balanced, as parallel.layers_per_stage is for others.")
    changed = parallel.model_copy(
        update={
            "schedule": name,
            "schedule_file": None,
            "virtual": virtual,
            "layers_per_stage": layers,
        }
    )
    return Config(**{**dict(config), "parallel": changed}), notes


def make_plan(config: Config, work: tuple[float, float, float] | None) -> Plan:
    """Simulate the config's schedule; parallel.data has to be filled in."""
    config, parallel = with_program(config), config.parallel
    costs = stage_costs(config) if work is None else equal_costs(config, Work(*work))
    timeline = simulate(training_program(config), costs)
    sent = _tensors_sent(stage_placement(config), parallel.pipeline)
    return Plan(
        name=parallel.schedule,
        virtual=parallel.virtual,
        timeline=timeline,
        live=timeline.peak_microbatches,
        live_bytes=peak_bytes(timeline, [stage_bytes(config, stage) for stage in stages(config)]),
        late=[count / parallel.virtual for count in timeline.peak_pending],
        sent=[count * microbatches(config) for count in sent],
        tensor_bytes=boundary_bytes(config),
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


def _report(
    config: Config, plans: Sequence[Plan], notes: Sequence[str], unit: str, columns: int
) -> str:
    out = StringIO()
    console = Console(file=out, width=max(columns, 100), highlight=False, color_system=None)
    print_text = partial(console.print, markup=False)
    lines = list(layout_lines(config))
    print_text("\n".join(lines if len(plans) == 1 else lines[:1]))
    print_text(
        f"{microbatches(config)} microbatches of {config.train.micro_batch_size} x "
        f'{config.train.sequence_length} tokens, recompute "{config.train.recompute}". '
        f"Time: {unit}."
    )
    if len(plans) == 1:
        rows = _some(plans[0].timeline.text((columns - 13) // 2).splitlines(), "...")
        print_text("".join(f"{row}\n" for row in ["", *rows]), end="")
        console.print(_ranks(plans[0]))
    console.print(_comparison(plans))
    print_text(
        "Bubble: idle time over busy time. Live: microbatches whose activations a rank holds, and "
        "an estimate of their memory; W late: microbatches whose weight gradients are put off; "
        "both at their peak. Sent: tensors in a step. Bytes are those of one tensor rank."
        + (" Each is of the rank that has most." if len(plans) > 1 else "")
    )
    for note in notes:
        print_text(note)
    return out.getvalue()


def _comparison(plans: Sequence[Plan]) -> Table:
    """A line for each schedule."""
    table = _columns("schedule", "chunks", "time", "bubble", "live", "memory", "W late", "sent")
    for plan in plans:
        table.add_row(
            plan.name,
            f"{plan.virtual}",
            f"{plan.timeline.makespan:,.1f}",
            f"{plan.timeline.bubble:.1%}",
            f"{max(plan.live):.4g}",
            size(max(plan.live_bytes)),
            f"{max(plan.late):.3g}" if any(plan.late) else "-",
            f"{max(plan.sent):,} x {size(plan.tensor_bytes)}",
        )
    return table


def _ranks(plan: Plan) -> Table:
    """A line for each rank of one schedule."""
    table = _columns("rank", "stages", "busy", "live", "memory", "W late", "sent")
    rows = []
    for rank, spans in enumerate(plan.timeline.spans):
        busy = sum(span.duration for span in spans) / plan.timeline.makespan
        stages = sorted({span.action.stage for span in spans})
        rows.append(
            [
                f"{rank}",
                ", ".join(map(str, stages if len(stages) < 5 else [*stages[:3], "..."])),
                f"{busy:.1%}",
                f"{plan.live[rank]:.4g}",
                size(plan.live_bytes[rank]),
                f"{plan.late[rank]:.3g}" if plan.late[rank] else "-",
                f"{plan.sent[rank]:,}",
            ]
        )
    for row in _some(rows, ["..."] * 7):
        table.add_row(*row)
    return table


def _columns(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _some(rows: list[Line], gap: Line) -> list[Line]:
    """All of them, or where there are many the first eight and the last."""
    return rows if len(rows) <= 16 else [*rows[:8], gap, rows[-1]]


def size(count: float) -> str:
    """Three digits: `512 KiB`, `61.3 MiB`, `1.25 GiB`."""
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 0.9995 * 2**power:
            return f"{count / 2**power:.3g} {name}"
    return f"{count:.0f} B"
