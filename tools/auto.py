"""parallel.schedule = "auto" where nothing is measured: in a dry run and in a proof.

The search runs with estimated costs and its program goes to a file, so that all that follows sees
an ordinary `csv` schedule. No torch.
"""

from contextlib import suppress
from pathlib import Path

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
from megapipe.pipeline.schedule import to_csv
from megapipe.pipeline.schedule.fitting import check_limit
from megapipe.pipeline.schedule.limit import Limit
from megapipe.pipeline.schedule.search import Found, search
from megapipe.pipeline.schedule.search.reason import forwards, seconds, summary
from megapipe.pipeline.schedule.stored import UnfitProgramError


def estimated_search(config: Config) -> Found:
    """What `auto` would choose with parallel.stage_costs, or else with costs by arithmetic.
    parallel.data must be filled in. Raises ScheduleError for a limit that nothing keeps."""
    parallel = config.parallel
    if parallel.stage_costs is not None:
        costs = read_costs(
            parallel.stage_costs, parallel.pipeline * parallel.virtual, boundary_bytes(config)
        )
    else:
        costs = stage_costs(looped(config))
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


def check_program(config: Config) -> None:
    """Raises ScheduleError for a program that can't be, or exceeds parallel.activation_limit, one
    in bytes by estimated activations."""
    program, limit = training_program(config), estimated_byte_limit(config)
    if limit is not None:
        check_limit(config.parallel.schedule, program, limit, virtual=config.parallel.virtual)


def without_auto(config: Config, folder: Path) -> tuple[Config, list[str]]:
    """The config with the program of its file, as `with_program` has it, and lines that say which
    it is in place of `auto`: the stored one where a run has it, or else a found one, written to
    `folder`."""
    parallel = config.parallel
    if parallel.schedule != "auto":
        return with_program(config), []
    with suppress(UnfitProgramError):
        file = Path(config.train.run_dir) / PROGRAM_FILE
        return with_program(config), [f"Program: that of {file}"]
    found = estimated_search(config)
    file = folder / PROGRAM_FILE
    file.write_text(to_csv(found.program), encoding="utf-8")
    measured = parallel.stage_costs is not None
    lines = summary(found, seconds if measured else forwards)
    lines.append(
        f"  Costs: from {parallel.stage_costs}."
        if measured
        else "  Costs: estimated by FLOPs. A run measures its stages and may choose another."
    )
    update = {"schedule": "csv", "schedule_file": str(file), "stage_costs": None}
    chosen = config.model_copy(update={"parallel": parallel.model_copy(update=update)})
    return with_program(chosen), lines
