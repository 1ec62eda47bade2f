"""Programs by the name that the config gives."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.generators import find_schedules
from megapipe.pipeline.schedule.generators.interleaved import microbatch_groups

SCHEDULES = find_schedules()


def build_program(name: str, *, pipeline: int, virtual: int, microbatches: int) -> Program:
    """The compute actions of a training step; `lower` adds the communication.

    Raises ScheduleError for an unknown name, or a number of chunks or microbatches that the
    schedule can't have.
    """
    if name not in SCHEDULES:
        raise ScheduleError(
            f'parallel.schedule = "{name}" is not a schedule. There are {", ".join(SCHEDULES)}.'
        )
    if pipeline < 1 or virtual < 1:
        raise ScheduleError(
            f"parallel.pipeline = {pipeline} and parallel.virtual = {virtual} must be 1 or more."
        )
    if microbatches < 1:
        raise ScheduleError(
            f"{microbatches} microbatches leave nothing to do: raise train.global_batch_size to at "
            "least train.micro_batch_size * parallel.data."
        )
    schedule = SCHEDULES[name]
    check_chunks(name, virtual)
    least = schedule.least_microbatches(pipeline)
    if microbatches < least:
        raise ScheduleError(
            f'parallel.schedule = "{name}" needs {least} microbatches or more in a pipeline of '
            f"{pipeline}; there are {microbatches}. Raise train.global_batch_size to at least "
            f"{least} * train.micro_batch_size * parallel.data, lower train.micro_batch_size, or "
            "take another schedule."
        )
    with _collector_paused():
        return schedule.generate(pipeline, virtual, microbatches)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """For work that makes many objects and no cycles, through all of which the garbage collector
    would look again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_chunks(name: str, virtual: int) -> None:
    """Raises ScheduleError unless the schedule can have so many chunks on a rank."""
    wrong = SCHEDULES[name].wrong_chunks(virtual)
    if wrong is not None:
        raise ScheduleError(f"parallel.virtual = {virtual} {wrong}.")


def forward_program(ranks: list[int], microbatches: int) -> Program:
    """Forwards only, for a validation loss: groups of microbatches go through the chunks.

    `ranks` holds the rank of each stage.
    """
    pipeline = max(ranks) + 1
    program: Program = [[] for _ in range(pipeline)]
    for group in microbatch_groups(microbatches, pipeline):
        for stage, rank in enumerate(ranks):
            program[rank] += [Action(stage, Kind.FORWARD, m) for m in group]
    return program
