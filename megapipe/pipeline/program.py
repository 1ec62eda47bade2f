"""From a config to its pipeline program, and to the rank of each stage."""

import math
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
from megapipe.precision import PRECISIONS

PROGRAM_FILE = "schedule.csv"
"""In the run directory: the program that `auto` chose for the run, which a resume takes again."""


def with_program(config: Config, content: bytes | None = None) -> Config:
    """The config with the program of its file, read (or taken from its `content`) and proved, which
    goes with it to all that asks for the program or the place of a stage. Schedules that are made
    by name have no file, and their configs stay as they are. parallel.data must be filled in.

    Raises ScheduleError as `read_stored` does, and for a program that exceeds a
    parallel.activation_limit in microbatches; for schedule auto, UnfitProgramError in place of that
    error, and where there is no file yet.
    """
    file = program_file(config)
    if file is None or _carried(config) is not None:
        return config
    auto = config.parallel.schedule == "auto"
    if auto and content is None and not file.exists():
        raise UnfitProgramError(f"there is no {file} yet")
    try:
        stored = read_stored(file, _shape(config), content)
    except UnfitProgramError:
        raise
    except ScheduleError as error:
        if not auto:
            raise
        text = str(error).removesuffix(".")
        raise ScheduleError(f"{text}. Delete the file to search anew.") from error
    try:
        _check_microbatch_limit(config, stored.program)
    except ScheduleError as error:
        raise (UnfitProgramError if auto else ScheduleError)(str(error)) from error
    return config.carrying(stored)


def training_program(config: Config) -> Program:
    """The compute actions of a training step; parallel.data must be filled in.

    Raises ScheduleError for a number of microbatches that the schedule can't have, for a program
    that holds more than a parallel.activation_limit in microbatches, and as `with_program` does.
    (What a limit in bytes allows is known when stages are.)
    """
    parallel = config.parallel
    if program_file(config) is not None:
        program = _stored(config).program
    else:
        program = build_program(
            parallel.schedule,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual,
            microbatches=microbatches(config),
        )
    _check_microbatch_limit(config, program)
    return program


def lowered_program(config: Config) -> Program:
    """`training_program` with its communication, proved to finish."""
    config = with_program(config)
    program = training_program(config)
    if program_file(config) is not None:
        return _stored(config).lowered
    lowered = lower(program)
    validate(lowered)
    return lowered


def stage_placement(config: Config) -> list[int]:
    """The pipeline rank of each stage, in the order in which a token passes them."""
    parallel = config.parallel
    if program_file(config) is not None:
        return _stored(config).placement
    return SCHEDULES[parallel.schedule].placement(parallel.pipeline, parallel.virtual)


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


def looped(config: Config) -> Config:
    """The same stages, placed in a loop, under a schedule that needs no file and has no limit."""
    name = "1f1b" if config.parallel.virtual == 1 else "interleaved-1f1b"
    update = {"schedule": name, "schedule_file": None, "activation_limit": None}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})


def program_file(config: Config) -> Path | None:
    """Where the program is read from, for schedules that are not made by name."""
    if config.parallel.schedule == "csv":
        assert config.parallel.schedule_file is not None
        return Path(config.parallel.schedule_file)
    if config.parallel.schedule == "auto":
        return Path(config.train.run_dir) / PROGRAM_FILE
    return None


def hidden_shape(config: Config) -> tuple[int, int, int]:
    """[S_local, B, H]: what stages pass on, on each tensor rank."""
    length = config.train.sequence_length
    if config.parallel.sequence_parallel:
        length //= config.parallel.tensor
    return length, config.train.micro_batch_size, config.model.hidden_size


def boundary_bytes(config: Config) -> int:
    """The tensor between two stages, on one tensor rank."""
    return math.prod(hidden_shape(config)) * PRECISIONS[config.train.precision].model_bytes


def microbatches(config: Config) -> int:
    """Microbatches of one replica in a step."""
    data, train = config.parallel.data, config.train
    assert data is not None
    return train.global_batch_size // (data * train.micro_batch_size)


# --- Programs that configs carry -----------------------------------------------------------------


def _shape(config: Config) -> Shape:
    return Shape(config.parallel.pipeline, config.parallel.virtual, microbatches(config))


def _carried(config: Config) -> StoredProgram | None:
    """What the config carries, if it was read for what the config says now."""
    stored = config.stored_program
    if stored is None or (stored.file, stored.shape) != (program_file(config), _shape(config)):
        return None
    return stored


def _stored(config: Config) -> StoredProgram:
    stored = _carried(with_program(config))
    assert stored is not None
    return stored


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
