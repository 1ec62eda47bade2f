"""Norm, largest value, mean, and what is not finite, of each tensor."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megapipe.checkpoint.slices import in_threads, slices
from megapipe.conversion.source import TensorStore


@dataclass(frozen=True)
class TensorStatistics:
    """Norm, largest absolute value and mean of the finite values of a tensor, in float64, and how
    many others there are."""

    norm: float
    largest: float
    mean: float
    nan: int
    infinite: int


def statistics_of(
    store: TensorStore, progress: Callable[[int], None] = lambda count: None
) -> dict[str, TensorStatistics]:
    """Of all tensors by name; `progress` is called with the bytes that were looked at.

    Raises CheckpointError or ConversionError where some can't be read or are damaged.
    """
    names = list(store.tensors)
    found = in_threads(lambda name: _of_one(store, name, progress), names)
    return dict(zip(names, found, strict=True))


def _of_one(store: TensorStore, name: str, progress: Callable[[int], None]) -> TensorStatistics:
    stored = store.tensors[name]
    squares = total = largest = 0.0
    count = nan = infinite = 0
    for part in slices(stored.shape):
        values = store.read(name, part.start, part.shape).flatten().to(torch.float64)
        size, square = len(values), float(values.dot(values))
        if not math.isfinite(square):
            nan += int(values.isnan().sum())
            infinite += int(values.isinf().sum())
            values = values[values.isfinite()]
            square = float(values.dot(values))
        if len(values):
            low, high = values.aminmax()
            largest = max(largest, -float(low), float(high))
            squares += square
            total += float(values.sum())
            count += len(values)
        progress(size * stored.dtype.itemsize)
    return TensorStatistics(math.sqrt(squares), largest, total / max(1, count), nan, infinite)
