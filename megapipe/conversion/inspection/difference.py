"""How the tensors of two directories differ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapipe.checkpoint.slices import in_threads, slices
from megapipe.conversion.inspection.order import listing_order
from megapipe.conversion.source import TensorInfo, TensorStore


@dataclass(frozen=True)
class TensorDifference:
    """How two tensors of one name differ.

    `differing` of the `values` are not the same: not bit by bit where both are stored in one dtype,
    else as numbers. The largest differences are those of values that are finite in both; relative
    ones are shares of the larger of the two. Of tensors of two shapes nothing is compared.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    values: int = 0
    differing: int = 0
    largest: float = 0.0
    relative: float = 0.0

    @property
    def differs(self) -> bool:
        """In shape, dtype, or a value."""
        one_kind = self.shapes[0] == self.shapes[1] and self.dtypes[0] == self.dtypes[1]
        return self.differing > 0 or not one_kind


@dataclass(frozen=True)
class StoreDifference:
    """How the tensors of two directories differ: `tensors` are those that both have. All are in
    the order of `listing_order`."""

    only_first: Sequence[str]
    only_second: Sequence[str]
    tensors: Sequence[TensorDifference]

    @property
    def differs(self) -> bool:
        alone = self.only_first or self.only_second
        return bool(alone) or any(one.differs for one in self.tensors)


def compare_tensors(
    first: TensorStore, second: TensorStore, progress: Callable[[int], None] = lambda count: None
) -> StoreDifference:
    """Compare all values; `progress` is called with the bytes that were looked at, of both.

    Raises CheckpointError or ConversionError where some can't be read or are damaged.
    """
    ours, theirs = (sorted(store.tensors, key=listing_order) for store in (first, second))
    common = [name for name in ours if name in second.tensors]
    return StoreDifference(
        [name for name in ours if name not in second.tensors],
        [name for name in theirs if name not in first.tensors],
        in_threads(lambda name: _compare(first, second, name, progress), common),
    )


def common_bytes(first: TensorStore, second: TensorStore) -> int:
    """Bytes of the tensors that `compare_tensors` reads."""
    return sum(
        part.volume * (one.dtype.itemsize + other.dtype.itemsize)
        for name, one in first.tensors.items()
        if (other := second.tensors.get(name)) is not None and one.shape == other.shape
        for part in slices(one.shape)
    )


def _compare(
    first: TensorStore, second: TensorStore, name: str, progress: Callable[[int], None]
) -> TensorDifference:
    one, other = first.tensors[name], second.tensors[name]
    shapes, dtypes = (one.shape, other.shape), (dtype_name(one), dtype_name(other))
    if one.shape != other.shape:
        return TensorDifference(name, shapes, dtypes)
    values = differing = 0
    largest = relative = 0.0
    for part in slices(one.shape):
        a = first.read(name, part.start, part.shape).flatten()
        b = second.read(name, part.start, part.shape).flatten()
        values += len(a)
        count = _count_differing(a, b)
        if count:
            differing += count
            absolute, share = _largest(a.to(torch.float64), b.to(torch.float64))
            largest, relative = max(largest, absolute), max(relative, share)
        progress(a.nbytes + b.nbytes)
    return TensorDifference(name, shapes, dtypes, values, differing, largest, relative)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _count_differing(a: Tensor, b: Tensor) -> int:
    if a.dtype == b.dtype:
        bits = _BITS[a.dtype.itemsize]
        return int((a.view(bits) != b.view(bits)).sum())
    a, b = a.to(torch.float64), b.to(torch.float64)
    return int(((a != b) & ~(a.isnan() & b.isnan())).sum())


def _largest(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest absolute and relative difference of the values that are finite in both."""
    both = a.isfinite() & b.isfinite()
    a, b = a[both], b[both]
    if not len(a):
        return 0.0, 0.0
    gaps = (a - b).abs()
    sizes = torch.maximum(a.abs(), b.abs())
    return float(gaps.max()), float(torch.where(gaps > 0, gaps / sizes, 0.0).max())


def dtype_name(stored: TensorInfo) -> str:
    """`float32`, `bfloat16`."""
    return str(stored.dtype).removeprefix("torch.")
