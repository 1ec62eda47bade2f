"""Ranks and their coordinates on the axes of a layout."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from megapipe.config.axes import AXES, AxisKind, Splits


@dataclass(frozen=True)
class Axes:
    """The size of each axis, and between ranks and their coordinates.

    A rank counts through its coordinates, the last axis fastest. Functions that take names of axes
    take any number of them; none stand for the rank alone.
    """

    sizes: Mapping[str, int]
    kinds: tuple[AxisKind, ...] = AXES

    def __post_init__(self) -> None:
        assert list(self.sizes) == [kind.name for kind in self.kinds], self.sizes

    @staticmethod
    def of(**sizes: int) -> "Axes":
        """The axes of AXES; those that are not named have size 1."""
        return Axes({kind.name: sizes.pop(kind.name, 1) for kind in AXES} | sizes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def world_size(self) -> int:
        return self.size(*self.names)

    def size(self, *names: str) -> int:
        """Ranks that differ only in these axes, one rank included."""
        return math.prod(self.sizes[name] for name in names)

    def that_split(self, *what: Splits) -> tuple[str, ...]:
        """The names of the axes that split one of these."""
        return tuple(kind.name for kind in self.kinds if kind.splits in what)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's place on each axis."""
        found: dict[str, int] = {}
        for name in reversed(self.names):
            rank, found[name] = divmod(rank, self.sizes[name])
        return {name: found[name] for name in self.names}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """The rank at a place."""
        rank = 0
        for name, size in self.sizes.items():
            rank = rank * size + coordinates[name]
        return rank

    def groups(self, *names: str) -> list[tuple[int, ...]]:
        """All groups of ranks that differ in these axes alone, in order: each rank is in one."""
        return self.subgroups({name: range(self.sizes[name]) for name in names})

    def subgroups(self, places: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
        """Groups of the ranks at the given places of some axes: one for each combination of the
        coordinates on all other axes."""
        others = [name for name in self.names if name not in places]
        return [
            self._combinations(dict(zip(others, fixed, strict=True)), places)
            for fixed in product(*(range(self.sizes[name]) for name in others))
        ]

    def describe(self, rank: int) -> str:
        """`rank 3 (pipeline 1, data 0, tensor 1)`."""
        places = ", ".join(f"{name} {place}" for name, place in self.coordinates(rank).items())
        return f"rank {rank} ({places})"

    def _combinations(
        self, fixed: Mapping[str, int], places: Mapping[str, Sequence[int]]
    ) -> tuple[int, ...]:
        choices = [places.get(name) or (fixed[name],) for name in self.names]
        return tuple(
            self.rank(dict(zip(self.names, chosen, strict=True))) for chosen in product(*choices)
        )
