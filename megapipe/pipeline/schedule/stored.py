"""Programs from files: read once, and proved for the layout that asks for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megapipe.amounts import counted
from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import (
    Kind,
    Program,
    compute_only,
    from_csv,
    sequential,
    stage_ranks,
)
from megapipe.pipeline.schedule.lower import lower
from megapipe.pipeline.schedule.validate import check_complete, validate


class UnfitProgramError(ScheduleError):
    """A program may be right, and is not one of this config."""


class Shape(NamedTuple):
    """What a program must have, as the config says it."""

    pipeline: int
    virtual: int
    microbatches: int


@dataclass(frozen=True)
class StoredProgram:
    """The compute actions of `file`, and the same with communication, proved; `placement` is the
    rank of each stage."""

    file: Path
    shape: Shape
    program: Program
    lowered: Program
    placement: list[int]


def read_stored(file: Path, shape: Shape, content: bytes | None = None) -> StoredProgram:
    """The program of a file, whose content may have been read already.

    Ranks may have unequal numbers of stages, `shape.virtual` on average, and each at least one.
    Raises UnfitProgramError for one of another shape or without a backward, and ScheduleError for
    a file that is no program, lacks an action, leaves a rank idle or can't finish.
    """
    with _naming(file):
        program = _parse(file, content)
        _check_ranks(program, shape.pipeline)
        ranks = stage_ranks(program)
        _check_shape(program, len(ranks), shape)
        check_complete(program)
        lowered = lower(program)
        validate(lowered)
    return StoredProgram(file, shape, program, lowered, [ranks[stage] for stage in sorted(ranks)])


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors say in which file they are."""
    try:
        yield
    except ScheduleError as error:
        raise type(error)(f"{file}: {error}") from error


def _parse(file: Path, content: bytes | None) -> Program:
    try:
        if content is None:
            content = file.read_bytes()
        text = content.decode("utf-8-sig")  # spreadsheets write a mark at the beginning
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ScheduleError(f"it can't be read as a program: {reason}") from error
    return compute_only(from_csv(text))


def _check_ranks(program: Program, pipeline: int) -> None:
    _check_equal(len(program), "rank", "parallel.pipeline", pipeline)
    for rank, actions in enumerate(program):
        if not actions:
            raise ScheduleError(
                f"rank {rank} (line {rank + 1}) computes nothing: give it a stage, or remove the "
                f"line and lower parallel.pipeline = {pipeline}"
            )


def _check_shape(program: Program, stages: int, shape: Shape) -> None:
    pipeline, virtual, microbatches = shape
    _check_equal(stages, "stage", "parallel.pipeline * parallel.virtual", pipeline * virtual)
    actions = [action for row in sequential(program) for action in row]
    if all(action.kind is Kind.FORWARD for action in actions):
        raise UnfitProgramError("the program has no backward: nothing would be trained")
    found = 1 + max(action.microbatch for action in actions)
    if found != microbatches:
        raise UnfitProgramError(
            f"the program has {counted(found, 'microbatch')}, and the config has {microbatches} "
            "(train.global_batch_size / (train.micro_batch_size * parallel.data)): make them equal"
        )


def _check_equal(found: int, noun: str, key: str, value: int) -> None:
    if found != value:
        raise UnfitProgramError(
            f"the program has {counted(found, noun)}, and {key} = {value}: make them equal"
        )
