"""What ranks add up after a step: quantities by name, in one collective.

Each part of a run registers the quantities that it gives, once, and gives its values in each step.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megapipe.distributed.mesh import Axis
from megapipe.tensor_parallel.collectives import all_reduce_
from megapipe.transfer import to_device

Given = float | Tensor | Mapping[int, float]
"""A number; a tensor on the device, with an element for each place; or numbers by place, where
other places get 0."""


class Totals:
    """The sums and maxima of one step, the same on every rank."""

    def __init__(self, values: Mapping[str, Sequence[float]]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> float:
        """Of a quantity that has one place."""
        (value,) = self._values[name]
        return value

    def all(self, name: str) -> Sequence[float]:
        """Of every place."""
        return self._values[name]

    def __add__(self, other: "Totals") -> "Totals":
        """Of two batches whose quantities are all sums."""
        names = self._values.keys()
        assert names == other._values.keys()
        pairs = {name: zip(self.all(name), other.all(name), strict=True) for name in names}
        return Totals({name: [a + b for a, b in both] for name, both in pairs.items()})


class StepSums:
    """Quantities and their places in the vector that ranks add up.

    Every rank registers the same quantities in the same order.
    """

    def __init__(self, device: torch.device, world: Axis) -> None:
        self._device, self._world = device, world
        self._places: dict[str, range] = {}
        self._maxima: dict[str, Axis] = {}
        self._size = 0

    def register(self, name: str, places: int = 1) -> None:
        """A quantity to be summed, at each of its places."""
        assert name not in self._places, f"{name} is registered twice"
        self._places[name] = range(self._size, self._size + places)
        self._size += places

    def register_maximum(self, name: str, over: Axis) -> None:
        """A quantity of which the largest value of an axis' ranks is wanted, 0 or more.

        It has a place for each rank of the axis. Of the ranks of the world that share a place, at
        most one may give a value: those given at one place are added up.
        """
        self.register(name, over.size)
        self._maxima[name] = over

    def reduce(self, given: Mapping[str, Given]) -> Totals:
        """Add up what all ranks give; a quantity that this rank does not give is 0 here.

        Collective over the world, and the one place where a step reads from the device.
        """
        numbers = [0.0] * self._size
        tensors: list[tuple[range, Tensor]] = []
        for name, value in given.items():
            places = self._places[name]
            if isinstance(value, Tensor):
                assert value.numel() == len(places), f"{name}: {value.numel()} of {len(places)}"
                tensors.append((places, value))
                continue
            for index, number in self._by_place(name, value).items():
                numbers[places[index]] = number
        totals = to_device(torch.tensor(numbers, dtype=torch.float64), self._device)
        for places, tensor in tensors:
            totals[places.start : places.stop] = tensor
        return self._by_name(all_reduce_(totals, self._world).tolist())

    def _by_place(self, name: str, value: float | Mapping[int, float]) -> Mapping[int, float]:
        if name in self._maxima:
            assert isinstance(value, int | float)
            return {self._maxima[name].rank: value}
        if isinstance(value, Mapping):
            return value
        (_,) = self._places[name]
        return {0: value}

    def _by_name(self, sums: list[float]) -> Totals:
        found = {name: sums[places.start : places.stop] for name, places in self._places.items()}
        return Totals({**found, **{name: [max(found[name])] for name in self._maxima}})


def join_given(parts: Iterable[Mapping[str, Given]]) -> dict[str, Given]:
    """What parts of a run give, in one mapping; each quantity is one part's."""
    joined: dict[str, Given] = {}
    for given in parts:
        twice = sorted(joined.keys() & given.keys())
        assert not twice, f"{', '.join(twice)} given by two parts of the run"
        joined.update(given)
    return joined


class StepPart:
    """A part of a run that gives quantities in each step. The engine that it has joined asks it."""

    def register(self, sums: StepSums) -> None:
        """Name the quantities."""

    def given(self) -> Mapping[str, Given]:
        """This rank's values, once the work of the step is queued."""
        return {}

    def reduced(self) -> None:
        """The collective of a step, or of a validation batch, has just ended on this rank."""
