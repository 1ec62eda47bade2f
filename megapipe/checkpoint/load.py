"""Loading: any rectangle of any tensor, put together from the chunks that hold parts of it."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapipe.checkpoint.manifest import Chunk, Manifest, TensorEntry
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.shard import TORCH_DTYPES, as_bytes
from megapipe.checkpoint.storage import (
    BLOCK_BYTES,
    check_size,
    checksum,
    open_regular,
    read_into,
    read_small,
)
from megapipe.checkpoint.verify import ByteRange, damage, describe, read_manifest
from megapipe.errors import CheckpointError

READ_BYTES = 64 * 2**20
"""Upper bound of the buffer for a part of a chunk that can't be read straight into place (plus one
block at each end)."""


def open_checkpoint(path: str | Path) -> "CheckpointReader":
    """Read and check the manifest of the checkpoint directory `path`; tensors are read on demand.

    Raises CheckpointError if there is none or it is damaged.
    """
    return CheckpointReader(Path(path), read_manifest(Path(path)))


class CheckpointReader:
    """What one checkpoint holds. `state` is the JSON that was saved with it.

    Reads verify what they return: a block is hashed when a byte of it is needed for the first time,
    in the buffer from which the tensor is filled. Later reads of a verified block fetch only their
    own bytes. (Partial reads by safetensors itself could not be checked: a checksum needs all bytes
    of its block, hence blocks of `BLOCK_BYTES` rather than one checksum per chunk.)
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._verified: set[tuple[str, int]] = set()

    @property
    def step(self) -> int | None:
        """None for a checkpoint of weights alone."""
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.manifest.state)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.manifest.tensors)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the small files kept in the checkpoint (config, tokenizer)."""
        return tuple(self.manifest.files)

    @property
    def config(self) -> dict[str, Any]:
        """`config.toml` of the run that saved this; of weights alone, it has only [model]."""
        return tomllib.loads(self.read_file("config.toml").decode())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self._entry(name).dtype]

    def verify(self) -> list[str]:
        """Check every byte of every file; one sentence for each problem, none when all is whole."""
        return damage(self.path, self.manifest)

    def require(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise one CheckpointError that lists what of `shapes` is missing or has another shape."""
        problems = []
        for name, shape in shapes.items():
            entry = self.manifest.tensors.get(name)
            if entry is None:
                problems.append(f"tensor {name} is not in it")
            elif entry.shape != tuple(shape):
                problems.append(
                    f"tensor {name} has shape {list(entry.shape)} there, {list(shape)} here"
                )
        if problems:
            lines = "\n  ".join(problems[:20])
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(f"{self.path} does not fit the model:\n  {lines}{more}")

    def read_file(self, name: str) -> bytes:
        """The content of one of `files`, verified."""
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.path} holds no file {name}")
        extra = self.manifest.files[name]
        content = read_small(self.path / name, extra.bytes)
        if len(content) != extra.bytes or checksum(content) != extra.checksum:
            span = ByteRange(name, 0, extra.bytes, extra.checksum, "the file")
            raise CheckpointError(describe(self.path / name, span))
        return content

    def read(
        self,
        name: str,
        start: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Rectangle [start, start + shape) of a tensor (all of it by default), on the CPU.

        The dtype is the one saved, or `dtype` if that is given: values are then rounded to it.
        Raises CheckpointError naming tensor and file if bytes are missing or damaged.
        """
        entry = self._entry(name)
        whole = Rectangle.whole(entry.shape)
        target = whole if start is None or shape is None else Rectangle(tuple(start), tuple(shape))
        if not whole.contains(target):
            raise CheckpointError(
                f"{self.path}: {target} lies outside tensor {name} of shape {list(entry.shape)}"
            )
        result = torch.empty(target.shape, dtype=dtype or TORCH_DTYPES[entry.dtype])
        for chunk in entry.chunks:
            part = target.intersection(chunk.rectangle)
            if part:
                self._fill(result[part.slices(target)], name, entry, chunk, part)
        return result

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self.manifest.tensors[name]

    def _fill(
        self, out: Tensor, name: str, entry: TensorEntry, chunk: Chunk, part: Rectangle
    ) -> None:
        """Copy `part` of a chunk to `out`, which has its shape."""
        path = self.path / chunk.file
        stored = TORCH_DTYPES[entry.dtype]
        with open_regular(path) as descriptor:
            check_size(descriptor, path, self.manifest.shards[chunk.file].bytes)
            if part == chunk.rectangle and out.is_contiguous() and out.dtype == stored:
                self._read_bytes(descriptor, as_bytes(out), 0, name, chunk)
                return
            strides = torch.empty(chunk.shape, device="meta").stride()
            rows = max(1, READ_BYTES // (strides[0] * stored.itemsize)) if strides else 1
            pieces = out.split(rows) if strides else (out,)
            for number, piece in enumerate(pieces):
                corner = [a - b for a, b in zip(part.start, chunk.start, strict=True)]
                if strides:
                    corner[0] += number * rows
                first = sum(i * stride for i, stride in zip(corner, strides, strict=True))
                reach = sum((n - 1) * s for n, s in zip(piece.shape, strides, strict=True))
                begin, end = first * stored.itemsize, (first + reach + 1) * stored.itemsize
                data = self._fetch(descriptor, begin, end, name, chunk)
                piece.copy_(data.view(stored).as_strided(piece.shape, strides))

    def _fetch(self, descriptor: int, begin: int, end: int, name: str, chunk: Chunk) -> Tensor:
        """Bytes [begin, end) of a chunk, all of them verified now or earlier."""
        touched = range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        known = all((chunk.file, chunk.offset + b * BLOCK_BYTES) in self._verified for b in touched)
        low = begin if known else touched.start * BLOCK_BYTES
        high = end if known else min(touched.stop * BLOCK_BYTES, chunk.bytes)
        buffer = torch.empty(high - low, dtype=torch.uint8)
        if known:
            view = buffer.numpy().data
            read_into(descriptor, view, chunk.offset + low, self.path / chunk.file)
        else:
            self._read_bytes(descriptor, buffer, low, name, chunk)
        return buffer[begin - low : end - low]

    def _read_bytes(
        self, descriptor: int, buffer: Tensor, low: int, name: str, chunk: Chunk
    ) -> None:
        """Fill `buffer` from byte `low` of a chunk, where a block begins, and verify the blocks."""
        path = self.path / chunk.file
        view = buffer.numpy().data
        for begin in range(0, len(view), BLOCK_BYTES):
            block = view[begin : begin + BLOCK_BYTES]
            offset = chunk.offset + low + begin
            read_into(descriptor, block, offset, path)
            expected = chunk.checksums[(low + begin) // BLOCK_BYTES]
            if checksum(block) != expected:
                span = ByteRange(chunk.file, offset, len(block), expected, f"tensor {name}")
                raise CheckpointError(describe(path, span))
            self._verified.add((chunk.file, offset))
