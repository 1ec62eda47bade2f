"""A rectangle of a tensor that lies row by row in a file, read with bounded memory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megapipe.checkpoint.shard import as_bytes
from megapipe.checkpoint.storage import read_into

BUFFER_BYTES = 64 * 2**20


def read_rectangle(
    descriptor: int,
    path: Path,
    *,
    offset: int,
    whole: Sequence[int],
    dtype: torch.dtype,
    start: Sequence[int],
    shape: Sequence[int],
) -> Tensor:
    """Rectangle [start, start + shape) of the tensor of shape `whole` at byte `offset`.

    Whole rows are read straight into the result, parts of rows through a buffer of at most
    `BUFFER_BYTES` (or one row). Raises CheckpointError where the file ends too early.
    """
    result = torch.empty(tuple(shape), dtype=dtype)
    if result.numel() == 0:
        return result
    strides = torch.empty(tuple(whole), device="meta").stride()
    if tuple(shape[1:]) == tuple(whole[1:]):
        begin = offset + start[0] * strides[0] * dtype.itemsize if strides else offset
        read_into(descriptor, as_bytes(result).numpy().data, begin, path)
        return result
    rows = max(1, BUFFER_BYTES // (strides[0] * dtype.itemsize))
    for number, part in enumerate(result.split(rows)):
        corner = [start[0] + number * rows, *start[1:]]
        first = sum(i * stride for i, stride in zip(corner, strides, strict=True))
        reach = sum((n - 1) * s for n, s in zip(part.shape, strides, strict=True)) + 1
        buffer = torch.empty(reach, dtype=dtype)
        read_into(descriptor, as_bytes(buffer).numpy().data, offset + first * dtype.itemsize, path)
        part.copy_(buffer.as_strided(part.shape, strides))
    return result
