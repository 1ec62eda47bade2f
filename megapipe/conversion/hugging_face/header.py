"""The header of a safetensors file: what is where, checked before anything is allocated.

Format: 8 bytes with the length of the header (little-endian), the header as JSON, the tensors.
https://huggingface.co/docs/safetensors
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megapipe.amounts import counted
from megapipe.checkpoint.storage import read_into
from megapipe.conversion.foreign_json import MAX_BYTES, parse_json
from megapipe.errors import CheckpointError, ConversionError
from megapipe.files import shown

MAX_RANK = 8
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorRange:
    """A tensor of a file: bytes [offset, offset + bytes) of it, row by row."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    bytes: int


def read_header(descriptor: int, path: Path) -> dict[str, TensorRange]:
    """All tensors of an open file. Raises ConversionError where the file is not whole or lies."""
    size = os.fstat(descriptor).st_size
    start = _read(descriptor, path, 0, min(8, size))
    if start == LFS_POINTER[:8]:
        raise _broken(path, "is a pointer of Git LFS, not the file itself: run `git lfs pull`")
    length = int.from_bytes(start, "little")
    if size < 8 or size - 8 < length <= MAX_BYTES:
        raise _broken(path, f"is cut off: it has {size:,} bytes; download it again")
    if length > MAX_BYTES:
        raise _broken(path, f"is not a safetensors file: its header would have {length:,} bytes")
    try:
        entries = parse_json(_read(descriptor, path, 8, length))
    except ValueError as error:
        raise _broken(path, f"is not a safetensors file: its header {error}") from None
    if not isinstance(entries, dict):
        raise _broken(path, "is not a safetensors file: its header is not a table")
    entries.pop("__metadata__", None)
    data = 8 + length
    ranges = {name: _range(path, name, entry, data) for name, entry in entries.items()}
    _check_tiling(path, ranges, data, size)
    return ranges


def _range(path: Path, name: str, entry: Any, data: int) -> TensorRange:
    what = f"tensor {shown(name[:200])}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _broken(path, f"{what}: dtype, shape or data_offsets are missing") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(
            path,
            f"{what} is stored as {shown(str(dtype))[:40]}, which is not read: take the model as "
            "BF16, F16 or F32",
        )
    if len(shape) > MAX_RANK or not all(_is_size(one) for one in (*shape, begin, end)):
        raise _broken(path, f"{what}: its shape or offsets are no numbers of elements")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise _broken(path, f"{what} of shape {list(shape)} can't have {end - begin} bytes")
    return TensorRange(shape, DTYPES[dtype], data + begin, expected)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**60


def _check_tiling(path: Path, ranges: dict[str, TensorRange], data: int, size: int) -> None:
    """Tensors follow each other to the end of the file, without gaps."""
    at = data
    for name, found in sorted(ranges.items(), key=lambda one: (one[1].offset, one[1].bytes)):
        if found.offset != at:
            raise _broken(path, f"tensor {shown(name[:200])} does not follow the one before it")
        at += found.bytes
    if at > size:
        raise _broken(path, f"is cut off: it has {size:,} of {at:,} bytes; download it again")
    if at < size:
        raise _broken(path, f"has {counted(size - at, 'byte')} that belong to no tensor")


def _read(descriptor: int, path: Path, offset: int, length: int) -> bytes:
    data = bytearray(length)
    try:
        read_into(descriptor, memoryview(data), offset, path)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    return bytes(data)


def _broken(path: Path, text: str) -> ConversionError:
    joint = " " if text.split()[0] in ("is", "has") else ": "
    return ConversionError(f"{shown(path)}{joint}{text}")
