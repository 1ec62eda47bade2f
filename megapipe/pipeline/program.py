"""From a config to its pipeline program, and to the rank of each stage."""

from pathlib import Path

from megapipe.config import Config
from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import SCHEDULES, Program, build_program, compute_only, from_csv
from megapipe.pipeline.schedule.action import stage_ranks

PROGRAM_FILE = "schedule.csv"
"""In the run directory: the program that `auto` chose for the run, which a resume takes again."""


def training_program(config: Config) -> Program:
    """The compute actions of a training step; parallel.data must be filled in.

    Raises ScheduleError for a number of microbatches that the schedule can't have, and for a file
    that is not a program of this layout.
    """
    parallel = config.parallel
    file = program_file(config)
    if file is None:
        return build_program(
            parallel.schedule,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual,
            microbatches=microbatches(config),
        )
    program = _read(file)
    _check_shape(program, file, config)
    return program


def stage_placement(config: Config) -> list[int]:
    """The pipeline rank of each stage, in the order in which a token passes them."""
    parallel = config.parallel
    file = program_file(config)
    if file is None:
        return SCHEDULES[parallel.schedule].placement(parallel.pipeline, parallel.virtual)
    ranks = stage_ranks(_read(file))
    return [ranks[stage] for stage in range(len(ranks))]


def program_file(config: Config) -> Path | None:
    """Where the program is read from, for schedules that are not made by name."""
    if config.parallel.schedule == "csv":
        assert config.parallel.schedule_file is not None
        return Path(config.parallel.schedule_file)
    if config.parallel.schedule == "auto":
        return Path(config.train.run_dir) / PROGRAM_FILE
    return None


def microbatches(config: Config) -> int:
    """Microbatches of one replica in a step."""
    data, train = config.parallel.data, config.train
    assert data is not None
    return train.global_batch_size // (data * train.micro_batch_size)


def _read(file: Path) -> Program:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"{file} can't be read as a program: {error}.") from error
    try:
        return compute_only(from_csv(text))
    except ScheduleError as error:
        raise ScheduleError(f"{file}: {error}.") from error


def _check_shape(program: Program, file: Path, config: Config) -> None:
    """Ranks, stages and microbatches are those of the config. (The rest is for `validate`.)"""
    parallel, count = config.parallel, microbatches(config)
    try:
        stages = len(stage_ranks(program))
    except ScheduleError as error:
        raise ScheduleError(f"{file}: {error}.") from error
    found = 1 + max((action.microbatch for row in program for action in row), default=-1)
    for key, has, needs in [
        ("parallel.pipeline", len(program), parallel.pipeline),
        ("parallel.pipeline * parallel.virtual", stages, parallel.pipeline * parallel.virtual),
    ]:
        if has != needs:
            what = "ranks (lines)" if key == "parallel.pipeline" else "stages"
            raise ScheduleError(f"{file} has {has} {what}, and {key} = {needs}: make them equal.")
    if found != count:
        raise ScheduleError(
            f"{file} is a program of {found} microbatches, and the config has {count} "
            "(train.global_batch_size / (train.micro_batch_size * parallel.data)): make them equal."
        )
