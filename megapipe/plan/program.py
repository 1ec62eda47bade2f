"""parallel.schedule = "auto" where nothing is measured: in a plan, a dry run, an equivalence check.

The search runs with estimated costs and its program goes to a file, so that all that follows sees
an ordinary `csv` schedule. No torch.
"""

from pathlib import Path
from typing import NamedTuple

from megapipe.config import Config
from megapipe.layout.axes import Axes
from megapipe.layout.estimates import stage_activation_bytes, stage_costs
from megapipe.layout.family import ModelFamily
from megapipe.layout.layout import Layout, resolve
from megapipe.layout.program import PROGRAM_FILE, byte_limit, looped_config, microbatch_limit
from megapipe.layout.world import resolve_axes
from megapipe.pipeline.costs import read_costs
from megapipe.pipeline.schedule import Costs, to_csv
from megapipe.pipeline.schedule.fitting import check_limit
from megapipe.pipeline.schedule.limit import Limit
from megapipe.pipeline.schedule.search import search
from megapipe.pipeline.schedule.search.reason import Unit, forwards, seconds, summary
from megapipe.pipeline.schedule.stored import UnfitProgramError

FLOPS_UNIT = "forward of one microbatch through a rank's share of the layers = 1"


class EstimatedTimes(NamedTuple):
    """What stages are taken to cost, and how to say it."""

    costs: Costs
    unit: str
    write: Unit
    source: str


def estimated_times(layout: Layout, file: str | None) -> EstimatedTimes:
    """Those of the layout's stages in a `file` as parallel.stage_costs names it, or else by
    arithmetic."""
    if file is None:
        return EstimatedTimes(stage_costs(layout), FLOPS_UNIT, forwards, "estimated by FLOPs")
    costs = read_costs(file, len(layout.stages), layout.boundary_bytes)
    return EstimatedTimes(costs, "s", seconds, f"from {file}")


def plan_layout(
    config: Config,
    axes: Axes | int | None,
    family: ModelFamily,
    folder: Path,
    times: EstimatedTimes | None = None,
) -> tuple[Layout, list[str]]:
    """The layout of a config for which nothing is measured, and lines that say which program it has
    in place of `auto`: the stored one where a run has it, or else one found for `times` (without
    them: for `estimated_times`) and written to `folder`.

    Raises ScheduleError for a program that can't be or exceeds parallel.activation_limit, one in
    bytes by estimated activations.
    """
    if not isinstance(axes, Axes):
        axes = resolve_axes(config, axes)
    layout, lines = _settled(config, axes, family, folder, times)
    limit = _estimated_byte_limit(config, layout)
    if limit is not None:
        name = config.parallel.schedule
        check_limit(name, layout.program.compute, limit, virtual=layout.virtual)
    return layout, lines


def _settled(
    config: Config,
    axes: Axes,
    family: ModelFamily,
    folder: Path,
    times: EstimatedTimes | None,
) -> tuple[Layout, list[str]]:
    parallel = config.parallel
    if parallel.schedule != "auto":
        return resolve(config, axes, family), []
    stored, lines = Path(config.train.run_dir) / PROGRAM_FILE, []
    try:
        return resolve(config, axes, family), [f"Program: that of {stored}"]
    except UnfitProgramError as error:
        if stored.exists():
            lines = [f"Not the program of {stored}, which does not fit here: {error}"]
    looped = resolve(looped_config(config), axes, family)
    times = times or estimated_times(looped, parallel.stage_costs)
    limit = _estimated_byte_limit(config, looped) or microbatch_limit(config)
    assert limit is not None, "auto always has a limit"
    found = search(axes.size("pipeline"), looped.virtual, looped.microbatches, times.costs, limit)
    file = folder / PROGRAM_FILE
    file.write_text(to_csv(found.program), encoding="utf-8")
    measures = parallel.stage_costs is None
    remark = " A run measures its stages and may choose another." if measures else ""
    lines += [*summary(found, times.write), f"  Costs: {times.source}.{remark}"]
    update = {"schedule": "csv", "schedule_file": str(file), "stage_costs": None}
    chosen = config.model_copy(update={"parallel": parallel.model_copy(update=update)})
    return resolve(chosen, axes, family), lines


def _estimated_byte_limit(config: Config, layout: Layout) -> Limit | None:
    """A parallel.activation_limit in bytes, with estimated activations of the layout's stages."""
    most = byte_limit(config)
    if most is None:
        return None
    held = [float(stage_activation_bytes(layout, stage)) for stage in layout.stages]
    return Limit.in_bytes(most, held)
