"""What a schedule is: a name, a generator, and what it can be asked for."""

from collections.abc import Callable
from dataclasses import dataclass

from megapipe.pipeline.schedule.action import Program
from megapipe.pipeline.schedule.placement import Placement, looped

Generator = Callable[[int, int, int], Program]
"""(pipeline, virtual, microbatches) -> the compute actions of every rank."""


def _one(pipeline: int) -> int:
    return 1


@dataclass(frozen=True)
class Schedule:
    """One family of programs. A module of `generators` defines it as its `SCHEDULE`.

    `chunks` are the fewest and the most stages on a rank (None: any number); `least_microbatches`
    is how many a pipeline of a given size needs. `placement` must be where the programs compute
    their stages.
    """

    name: str
    generate: Generator
    chunks: tuple[int, int | None] = (1, 1)
    placement: Placement = looped
    least_microbatches: Callable[[int], int] = _one
