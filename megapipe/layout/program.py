"""The pipeline program that a config asks for: made by name, or read from a file and proved."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megapipe.config import Config
from megapipe.config.parallel import parse_memory
from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import SCHEDULES, Program, build_program, lower, validate
from megapipe.pipeline.schedule.fitting import check_limit
from megapipe.pipeline.schedule.limit import Limit, Memory
from megapipe.pipeline.schedule.stored import (
    Shape,
    StoredProgram,
    UnfitProgramError,
    read_stored,
)

PROGRAM_FILE = "schedule.csv"
"""In the run directory: the program that `auto` chose for the run, which a resume takes again."""


@dataclass(frozen=True)
class ResolvedProgram:
    """The compute actions of a training step, and the pipeline rank of each stage, in the order in
    which a token passes them. `proved` is its lowered form where that has been proved already."""

    compute: Program
    placement: list[int]
    proved: Program | None = None

    @cached_property
    def lowered(self) -> Program:
        """The actions with their communication, proved to finish."""
        if self.proved is not None:
            return self.proved
        lowered = lower(self.compute)
        validate(lowered)
        return lowered


def resolve_program(
    config: Config, microbatches: int, content: bytes | None = None
) -> ResolvedProgram:
    """The program for a number of microbatches of each replica; `content` is that of its file where
    it has been read already.

    Raises ScheduleError for a number of microbatches that the schedule can't have, for a program
    that holds more than a parallel.activation_limit in microbatches (what a limit in bytes allows
    is known when stages are), and as `read_stored` does; for schedule auto, UnfitProgramError where
    that is so of a program that is right in itself, and where there is no file yet.
    """
    parallel = config.parallel
    if program_file(config) is None:
        program = build_program(
            parallel.schedule,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual,
            microbatches=microbatches,
        )
        _check_microbatch_limit(config, program)
        placement = SCHEDULES[parallel.schedule].placement(parallel.pipeline, parallel.virtual)
        return ResolvedProgram(program, placement)
    stored = _read(config, Shape(parallel.pipeline, parallel.virtual, microbatches), content)
    try:
        _check_microbatch_limit(config, stored.program)
    except ScheduleError as error:
        kind = UnfitProgramError if parallel.schedule == "auto" else ScheduleError
        raise kind(str(error)) from error
    return ResolvedProgram(stored.program, stored.placement, stored.lowered)


def microbatch_limit(config: Config) -> Limit | None:
    """parallel.activation_limit where it counts microbatches. `auto` has one if nothing is said:
    what 1F1B holds, so that a run that fits with that fits with `auto`."""
    parallel = config.parallel
    most = parallel.activation_limit
    if most is None and parallel.schedule == "auto":
        most = float(parallel.pipeline)
    if most is None or isinstance(most, str):
        return None
    return Limit.in_microbatches(most, parallel.pipeline, parallel.virtual)


def byte_limit(config: Config) -> Memory | None:
    """parallel.activation_limit where it is memory."""
    text = config.parallel.activation_limit
    if not isinstance(text, str):
        return None
    most = parse_memory(text)
    assert most is not None, "the config was checked"
    return Memory(most, text)


def looped_config(config: Config) -> Config:
    """The same stages, placed in a loop, under a schedule that needs no file and has no limit."""
    name = "1f1b" if config.parallel.virtual == 1 else "interleaved-1f1b"
    nothing = dict.fromkeys(("schedule_file", "activation_limit", "stage_costs"))
    update = {"schedule": name, **nothing}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})


def program_file(config: Config) -> Path | None:
    """Where the program is read from, for schedules that are not made by name."""
    if config.parallel.schedule == "csv":
        assert config.parallel.schedule_file is not None
        return Path(config.parallel.schedule_file)
    if config.parallel.schedule == "auto":
        return Path(config.train.run_dir) / PROGRAM_FILE
    return None


def _read(config: Config, shape: Shape, content: bytes | None) -> StoredProgram:
    file = program_file(config)
    assert file is not None
    auto = config.parallel.schedule == "auto"
    if auto and content is None and not file.exists():
        raise UnfitProgramError(f"there is no {file} yet")
    try:
        return read_stored(file, shape, content)
    except UnfitProgramError:
        raise
    except ScheduleError as error:
        if not auto:
            raise
        text = str(error).removesuffix(".")
        raise ScheduleError(f"{text}. Delete the file to search anew.") from error


def _check_microbatch_limit(config: Config, program: Program) -> None:
    limit, parallel = microbatch_limit(config), config.parallel
    if limit is None:
        return
    # As configs are checked: a layer or more in each stage, and one stage where there is one rank.
    most_virtual = config.model.num_layers // parallel.pipeline if parallel.pipeline > 1 else 1
    check_limit(
        parallel.schedule,
        program,
        limit,
        virtual=parallel.virtual,
        most_virtual=most_virtual,
    )
