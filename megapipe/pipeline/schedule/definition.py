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

    @property
    def possible_chunks(self) -> str:
        """`2`, `2 or more`, `2 to 4`."""
        fewest, most = self.chunks
        if most is None:
            return f"{fewest} or more"
        return f"{fewest}" if most == fewest else f"{fewest} to {most}"

    def takes(self, virtual: int) -> bool:
        """Whether it can have so many chunks on a rank."""
        fewest, most = self.chunks
        return fewest <= virtual and (most is None or virtual <= most)

    def wrong_chunks(self, virtual: int) -> str | None:
        """Why parallel.virtual can't be that, as the rest of a sentence; None if it can."""
        if self.takes(virtual):
            return None
        text = f'must be {self.possible_chunks} with parallel.schedule = "{self.name}"'
        if self.chunks == (1, 1):
            text += ", which has one group of layers per rank (interleaved-1f1b has more)"
        return text
