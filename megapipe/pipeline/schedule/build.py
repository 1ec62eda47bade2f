"""Programs by the name that the config gives."""

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.gpipe import gpipe
from megapipe.pipeline.schedule.interleaved import groups, interleaved
from megapipe.pipeline.schedule.one_f_one_b import one_f_one_b

SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b")


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
    if name == "interleaved-1f1b":
        return interleaved(pipeline, virtual, microbatches)
    if virtual != 1:
        raise ScheduleError(
            f'parallel.schedule = "{name}" has one chunk on each rank: set parallel.virtual = 1 '
            f'(it is {virtual}), or parallel.schedule = "interleaved-1f1b".'
        )
    make = {"gpipe": gpipe, "1f1b": one_f_one_b}[name]
    return make(pipeline, microbatches)


def forward_program(pipeline: int, virtual: int, microbatches: int) -> Program:
    """Forwards only, for a validation loss: groups of microbatches loop through the chunks."""
    return [
        [
            Action(chunk * pipeline + rank, Kind.FORWARD, microbatch)
            for group in groups(microbatches, pipeline)
            for chunk in range(virtual)
            for microbatch in group
        ]
        for rank in range(pipeline)
    ]
