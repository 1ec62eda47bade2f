"""From a config to its pipeline program, and to the rank of each stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapipe.config import Config
from megapipe.config.parallel import parse_memory
from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import (
    SCHEDULES,
    Kind,
    Program,
    build_program,
    compute_only,
    from_csv,
    lower,
    validate,
)
from megapipe.pipeline.schedule.action import sequential, stage_ranks
from megapipe.pipeline.schedule.fitting import check_limit
from megapipe.pipeline.schedule.limit import Limit
from megapipe.pipeline.schedule.validate import check_complete

PROGRAM_FILE = "schedule.csv"
"""In the run directory: the program that `auto` chose for the run, which a resume takes again."""


def training_program(config: Config) -> Program:
    """The compute actions of a training step; parallel.data must be filled in.

    Raises ScheduleError for a number of microbatches that the schedule can't have, for a file that
    is not a program of this layout, lacks an action or can't finish, and for a program that holds
    more than a parallel.activation_limit in microbatches. (What one in bytes allows is known when
    stages are.)
    """
    parallel = config.parallel
    file = program_file(config)
    if file is None:
        program = build_program(
            parallel.schedule,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual,
            microbatches=microbatches(config),
        )
    else:
        program = _read(file, config)
        with _naming(file):
            _check_work(program, microbatches(config))
            check_complete(program)
            validate(lower(program))
    limit = microbatch_limit(config)
    if limit is not None:
        check_limit(parallel.schedule, program, limit, virtual=parallel.virtual)
    return program


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


def byte_limit(config: Config) -> int | None:
    """parallel.activation_limit where it is memory."""
    most = config.parallel.activation_limit
    return parse_memory(most) if isinstance(most, str) else None


def looped(config: Config) -> Config:
    """The same stages, placed in a loop, under a schedule that needs no file and has no limit."""
    name = "1f1b" if config.parallel.virtual == 1 else "interleaved-1f1b"
    update = {"schedule": name, "schedule_file": None, "activation_limit": None}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})


def stage_placement(config: Config) -> list[int]:
    """The pipeline rank of each stage, in the order in which a token passes them."""
    parallel = config.parallel
    file = program_file(config)
    if file is None:
        return SCHEDULES[parallel.schedule].placement(parallel.pipeline, parallel.virtual)
    ranks = stage_ranks(_read(file, config))
    return [ranks[stage] for stage in range(len(ranks))]


def why_not_stored(config: Config) -> str | None:
    """For `auto`: why the run directory's program can't be this run's, None if it can.

    Raises ScheduleError for a file that is no program at all.
    """
    file = Path(config.train.run_dir) / PROGRAM_FILE
    if not file.exists():
        return f"there is no {file} yet"
    try:
        with _naming(file):
            validate(lower(_parse(file)))
    except ScheduleError as error:
        raise ScheduleError(f"{error}. Delete the file to search anew.") from error
    try:
        training_program(config)
    except ScheduleError as error:
        return str(error)
    return None


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


def microbatches(config: Config) -> int:
    """Microbatches of one replica in a step."""
    data, train = config.parallel.data, config.train
    assert data is not None
    return train.global_batch_size // (data * train.micro_batch_size)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors say in which file they are."""
    try:
        yield
    except ScheduleError as error:
        raise ScheduleError(f"{file}: {error}") from error


def _read(file: Path, config: Config) -> Program:
    """A program with the ranks and stages of the config."""
    parallel = config.parallel
    with _naming(file):
        program = _parse(file)
        _check_equal(len(program), "ranks (lines)", "parallel.pipeline", parallel.pipeline)
        key, stages = "parallel.pipeline * parallel.virtual", parallel.pipeline * parallel.virtual
        _check_equal(len(stage_ranks(program)), "stages", key, stages)
    return program


def _parse(file: Path) -> Program:
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets write a mark at the beginning
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"it can't be read as a program: {error}") from error
    return compute_only(from_csv(text))


def _check_equal(found: int, what: str, key: str, value: int) -> None:
    if found != value:
        raise ScheduleError(f"the program has {found} {what}, and {key} = {value}: make them equal")


def _check_work(program: Program, count: int) -> None:
    actions = [action for row in sequential(program) for action in row]
    if all(action.kind is Kind.FORWARD for action in actions):
        raise ScheduleError("the program has no backward: nothing would be trained")
    found = 1 + max(action.microbatch for action in actions)
    if found != count:
        raise ScheduleError(
            f"the program has {found} microbatches, and the config has {count} "
            "(train.global_batch_size / (train.micro_batch_size * parallel.data)): make them equal"
        )
