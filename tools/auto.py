"""parallel.schedule = "auto" where nothing is measured: in a plan, a dry run and a proof.

The search runs with estimated costs and its program goes to a file, so that all that follows sees
an ordinary `csv` schedule. No torch.
"""

from pathlib import Path
from typing import NamedTuple

from megapipe.config import Config
from megapipe.models.activations import stage_bytes
from megapipe.models.partition import stages
from megapipe.models.stage_costs import stage_costs
from megapipe.pipeline.costs import read_costs
from megapipe.pipeline.program import (
    PROGRAM_FILE,
    boundary_bytes,
    byte_limit,
    looped,
    microbatch_limit,
    microbatches,
    training_program,
    with_program,
)
from megapipe.pipeline.schedule import Costs, Program, to_csv
from megapipe.pipeline.schedule.fitting import check_limit
from megapipe.pipeline.schedule.limit import Limit
from megapipe.pipeline.schedule.search import Found, search
from megapipe.pipeline.schedule.search.reason import Unit, forwards, seconds, summary
from megapipe.pipeline.schedule.stored import UnfitProgramError

FLOPS_UNIT = "forward of one microbatch through a rank's share of the layers = 1"


class StageTimes(NamedTuple):
    """What stages are taken to cost, and how to say it."""

    costs: Costs
    unit: str
    write: Unit
    source: str


def estimated_times(config: Config, file: str | None) -> StageTimes:
    """Those of a `file` as parallel.stage_costs names it, or else by arithmetic."""
    parallel = config.parallel
    if file is None:
        return StageTimes(stage_costs(looped(config)), FLOPS_UNIT, forwards, "estimated by FLOPs")
    costs = read_costs(file, parallel.pipeline * parallel.virtual, boundary_bytes(config))
    return StageTimes(costs, "s", seconds, f"from {file}")


def estimated_search(config: Config, costs: Costs) -> Found:
    """What `auto` would choose. parallel.data must be filled in. Raises ScheduleError for a limit
    that nothing keeps."""
    parallel = config.parallel
    limit = estimated_byte_limit(config) or microbatch_limit(config)
    assert limit is not None, "auto always has a limit"
    return search(parallel.pipeline, parallel.virtual, microbatches(config), costs, limit)


def estimated_byte_limit(config: Config) -> Limit | None:
    """A parallel.activation_limit in bytes, with estimated activations."""
    most = byte_limit(config)
    if most is None:
        return None
    held = [float(stage_bytes(config, stage)) for stage in stages(looped(config))]
    return Limit.in_bytes(most, held)


def checked_program(config: Config) -> Program:
    """The compute actions of a training step. Raises ScheduleError for a program that can't be, or
    exceeds parallel.activation_limit, one in bytes by estimated activations."""
    program, limit = training_program(config), estimated_byte_limit(config)
    if limit is not None:
        check_limit(config.parallel.schedule, program, limit, virtual=config.parallel.virtual)
    return program


def without_auto(
    config: Config, folder: Path, times: StageTimes | None = None
) -> tuple[Config, list[str]]:
    """The config with the program of its file, as `with_program` has it, and lines that say which
    it is in place of `auto`: the stored one where a run has it, or else one found for `times`
    (without them: for those of parallel.stage_costs or by arithmetic) and written to `folder`."""
    parallel = config.parallel
    if parallel.schedule != "auto":
        return with_program(config), []
    stored, lines = Path(config.train.run_dir) / PROGRAM_FILE, []
    try:
        return with_program(config), [f"Program: that of {stored}"]
    except UnfitProgramError as error:
        if stored.exists():
            lines = [f"Not the program of {stored}, which does not fit here: {error}"]
    times = times or estimated_times(config, parallel.stage_costs)
    found = estimated_search(config, times.costs)
    file = folder / PROGRAM_FILE
    file.write_text(to_csv(found.program), encoding="utf-8")
    measures = parallel.stage_costs is None
    remark = " A run measures its stages and may choose another." if measures else ""
    lines += [*summary(found, times.write), f"  Costs: {times.source}.{remark}"]
    update = {"schedule": "csv", "schedule_file": str(file), "stage_costs": None}
    chosen = config.model_copy(update={"parallel": parallel.model_copy(update=update)})
    return with_program(chosen), lines
