"""Tensors as ranges of files: read in parts, with bounded memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megapipe.checkpoint.storage import open_regular, read_into

READ_BYTES = 64 * 2**20
"""The most bytes of a file that are in memory at a time, besides the result."""
RUN_BYTES = 2**20
"""Up to this many bytes are read at once even where few of them are wanted: seeking costs more."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """A tensor in a file, or a part of one: its first element at byte `offset`, `strides` in
    elements, `dtype` without `torch.`."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def row_major(
        cls, path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> "StridedTensor":
        """One whose values lie in order and without gaps."""
        name = str(dtype).removeprefix("torch.")
        return cls(path, offset, name, shape, torch.empty(shape, device="meta").stride())

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def reach(self) -> int:
        """Bytes from the first element to the end of the last one; 0 where there is none."""
        if 0 in self.shape:
            return 0
        steps = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return (steps + 1) * self.item_bytes

    @property
    def is_row_major(self) -> bool:
        """Whether its values lie in order and without gaps."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def moved(self, elements: int) -> "StridedTensor":
        return replace(self, offset=self.offset + elements * self.item_bytes)

    def part(self, start: Sequence[int], shape: Sequence[int]) -> "StridedTensor":
        """The rectangle [start, start + shape) of it."""
        steps = sum(i * step for i, step in zip(start, self.strides, strict=True))
        return replace(self.moved(steps), shape=tuple(shape))

    def without_first_dim(self) -> "StridedTensor":
        """The same values, where the first dimension has size 1."""
        assert self.shape[0] == 1, self.shape
        return replace(self, shape=self.shape[1:], strides=self.strides[1:])

    def copy_to(self, out: Tensor) -> None:
        """Open the file and read all of the tensor into `out`, as `read_from` does."""
        with open_regular(self.path) as descriptor:
            self.read_from(descriptor, out)

    def read_from(self, descriptor: int, out: Tensor) -> None:
        """Read all of it from its open file into `out`, which has its shape; values are rounded to
        the dtype there.

        Raises CheckpointError naming the file where bytes are missing.
        """
        assert out.shape == self.shape, (out.shape, self.shape)
        if not out.numel():
            return
        wanted = math.prod(self.shape) * self.item_bytes
        sparse = self.reach > RUN_BYTES and self.reach > 4 * wanted
        if out.numel() > 1 and (self.reach > READ_BYTES or sparse):
            self._copy_halves(descriptor, out)
            return
        dtype = DTYPES[self.dtype]
        if self.is_row_major and out.is_contiguous() and out.dtype == dtype:
            straight = out.view(-1).view(torch.uint8)
            read_into(descriptor, straight.numpy().data, self.offset, self.path)
            return
        buffer = torch.empty(self.reach, dtype=torch.uint8)
        read_into(descriptor, buffer.numpy().data, self.offset, self.path)
        out.copy_(buffer.view(dtype).as_strided(self.shape, self.strides))

    def _copy_halves(self, descriptor: int, out: Tensor) -> None:
        """Read in two parts, cut along the dimension with the longest way through the file."""
        ways = [(n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)]
        dim = ways.index(max(ways))
        middle = self.shape[dim] // 2
        for begin, count in ((0, middle), (middle, self.shape[dim] - middle)):
            start, shape = [0] * len(self.shape), list(self.shape)
            start[dim], shape[dim] = begin, count
            self.part(start, shape).read_from(descriptor, out.narrow(dim, begin, count))
