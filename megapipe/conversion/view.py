"""A model of ours as the tensors of another stack: what an export writes."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megapipe.checkpoint.rectangle import Rectangle
from megapipe.conversion.source import WeightSource
from megapipe.layout.architecture import Architecture, ForeignTensor, Piece


class TensorView:
    """The tensors of an architecture, read by rectangles from weights under our names.

    pad_to: padded tensors have a multiple of this many rows, the last of which are zero.
    """

    def __init__(self, source: WeightSource, architecture: Architecture, pad_to: int = 1) -> None:
        self._source = source
        self.tensors: Mapping[str, ForeignTensor] = {
            tensor.name: tensor for tensor in architecture.tensors(source.model)
        }
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: _padded(tensor, pad_to) for name, tensor in self.tensors.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        """What the values are stored as: the widest where pieces differ."""
        dtypes = [self._source.dtype(piece.parameter) for piece in self.tensors[name].pieces]
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        return widest

    def size(self, name: str) -> int:
        """Elements of a whole tensor."""
        return math.prod(self.shapes[name])

    def read(
        self, name: str, start: Sequence[int], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Rectangle [start, start + shape) of a tensor, rounded to `dtype`, on the CPU."""
        tensor = self.tensors[name]
        wanted = Rectangle(tuple(start), tuple(shape))
        if tensor.transposed:
            wanted = Rectangle(wanted.start[::-1], wanted.shape[::-1])
        result = self._read(tensor, wanted, dtype)
        return result.t() if tensor.transposed else result

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A whole tensor, rounded to `dtype`."""
        shape = self.shapes[name]
        return self.read(name, (0,) * len(shape), shape, dtype)

    def _read(self, tensor: ForeignTensor, wanted: Rectangle, dtype: torch.dtype) -> Tensor:
        """`wanted` counts rows in our order of dimensions."""
        parts = [(piece, part) for piece in tensor.pieces if (part := _rows_of(piece, wanted))]
        if len(parts) == 1 and parts[0][1] == wanted:
            return self._read_piece(*parts[0], dtype)
        result = torch.zeros(wanted.shape, dtype=dtype)
        for piece, part in parts:
            result[part.slices(wanted)] = self._read_piece(piece, part, dtype)
        return result

    def _read_piece(self, piece: Piece, part: Rectangle, dtype: torch.dtype) -> Tensor:
        first = part.start[0] - piece.row + piece.start
        return self._source.read(piece.parameter, (first, *part.start[1:]), part.shape, dtype)


def _rows_of(piece: Piece, wanted: Rectangle) -> Rectangle | None:
    """What `wanted` has of the rows of a piece."""
    rows = Rectangle((piece.row, *wanted.start[1:]), (piece.rows, *wanted.shape[1:]))
    return rows.intersection(wanted)


def _padded(tensor: ForeignTensor, pad_to: int) -> tuple[int, ...]:
    if not tensor.padded:
        return tensor.shape
    rows = -(-tensor.shape[0] // pad_to) * pad_to
    return (rows, *tensor.shape[1:])
