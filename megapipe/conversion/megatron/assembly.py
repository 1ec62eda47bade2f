"""Global tensors out of the parts that files hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapipe.checkpoint.rectangle import Rectangle, covers, first_gap, first_overlap
from megapipe.conversion.strided import DTYPES, StridedTensor
from megapipe.errors import CheckpointError

MAX_PARTS = 4096
"""Of one tensor: finding a gap between parts may take a time that grows with their square."""


@dataclass(frozen=True, slots=True)
class TensorPart:
    """The values of `rectangle` of a global tensor. `locate` says where they lie, with its shape;
    it may read a little of a file to find out."""

    rectangle: Rectangle
    locate: Callable[[], StridedTensor]


@dataclass(frozen=True, slots=True)
class GlobalTensor:
    """A tensor of the model, whole: rows and columns of all ranks."""

    shape: tuple[int, ...]
    stored: str
    """The dtype in the files, without `torch.`."""
    parts: tuple[TensorPart, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored]

    def check_bounds(self) -> None:
        """Raise CheckpointError where a part lies outside of the tensor."""
        whole = Rectangle.whole(self.shape)
        for part in self.parts:
            if not whole.contains(part.rectangle):
                raise CheckpointError(f"part {part.rectangle} lies outside of {list(self.shape)}")

    def check(self) -> None:
        """Raise CheckpointError where the parts don't hold each value exactly once."""
        self.check_bounds()
        if self.stored not in DTYPES:
            raise CheckpointError(f"its dtype {self.stored} can't be read")
        if len(self.parts) > MAX_PARTS:
            raise CheckpointError(f"it has {len(self.parts)} parts, more than {MAX_PARTS}")
        whole = Rectangle.whole(self.shape)
        rectangles = [part.rectangle for part in self.parts]
        if covers(whole, rectangles):
            return
        gap = first_gap(whole, rectangles)
        if gap:
            raise CheckpointError(f"no file holds {gap} of its shape {list(self.shape)}")
        overlap = first_overlap(rectangles)
        assert overlap is not None
        raise CheckpointError(f"its parts {overlap[0]} and {overlap[1]} overlap")

    def read(
        self,
        start: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Rectangle [start, start + shape) (all of it by default), on the CPU.

        The dtype is the one in the files, or `dtype`: values are then rounded to it. Only the
        files that hold some of the rectangle are opened. Raises CheckpointError.
        """
        whole = Rectangle.whole(self.shape)
        target = whole if start is None or shape is None else Rectangle(tuple(start), tuple(shape))
        if not whole.contains(target):
            raise CheckpointError(f"{target} lies outside of its shape {list(self.shape)}")
        result = torch.empty(target.shape, dtype=dtype or self.dtype)
        for part in self.parts:
            wanted = target.intersection(part.rectangle)
            if wanted is None:
                continue
            inside = [a - b for a, b in zip(wanted.start, part.rectangle.start, strict=True)]
            part.locate().part(inside, wanted.shape).copy_to(result[wanted.slices(target)])
        return result


def unstacked(tensor: GlobalTensor) -> list[GlobalTensor]:
    """The tensors that `tensor` stacks along its first dimension."""
    parts: list[list[TensorPart]] = [[] for _ in range(tensor.shape[0])]
    for part in tensor.parts:
        begin, count = part.rectangle.start[0], part.rectangle.shape[0]
        for number in range(begin, begin + count):
            parts[number].append(_layer(part, number - begin))
    return [GlobalTensor(tensor.shape[1:], tensor.stored, tuple(one)) for one in parts]


def joined(first: GlobalTensor, second: GlobalTensor) -> GlobalTensor:
    """The rows of `first`, then those of `second`."""
    below = [
        TensorPart(
            Rectangle(
                (part.rectangle.start[0] + first.shape[0], *part.rectangle.start[1:]),
                part.rectangle.shape,
            ),
            part.locate,
        )
        for part in second.parts
    ]
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    return GlobalTensor(shape, first.stored, (*first.parts, *below))


def _layer(part: TensorPart, number: int) -> TensorPart:
    """Index `number` of the first dimension of a part."""
    start, shape = part.rectangle.start, part.rectangle.shape

    def locate() -> StridedTensor:
        first = [number, *[0] * (len(shape) - 1)]
        return part.locate().part(first, (1, *shape[1:])).without_first_dim()

    return TensorPart(Rectangle(start[1:], shape[1:]), locate)
