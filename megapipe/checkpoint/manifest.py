"""The manifest: one JSON file that says what a checkpoint holds, where, and with which checksums.

Format version 2. A checkpoint is a directory of

    manifest.json                    this file, the last to be written
    shard-00000-of-00004.safetensors one per rank that held any; every safetensors reader opens it
    config.toml, tokenizer.model ... small files kept beside

Each global tensor is cut into chunks: rectangles that tile it exactly, each of them a range of
bytes (row-major, little-endian) of one shard file. Every byte of every file lies under exactly one
checksum: a chunk's blocks, a shard's header, a small file, or the manifest's own, which is its last
field and covers the bytes before it. Checksums find damage; they don't prove who wrote the file, so
what is read is distrusted: names are plain, sizes bounded, chunks inside their tensors and files.

A checkpoint of weights alone has null for its step: it holds no optimizer state and no position in
the data, and its config.toml has only [model]. Version 1, which is read too, has no such ones.
"""

import json
import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from megapipe.amounts import counted
from megapipe.checkpoint.rectangle import Rectangle, covers, first_gap, first_overlap
from megapipe.checkpoint.steps import MANIFEST_NAME
from megapipe.checkpoint.storage import BLOCK_BYTES, checksum
from megapipe.errors import CheckpointError

FORMAT = "megapipe-checkpoint"
VERSION = 2
WEIGHTS_PREFIX = "weights/"
"""With which the names of weights begin; a checkpoint of weights alone has no others."""
MAX_MANIFEST_BYTES = 512 * 2**20
MAX_EXTRA_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 100_000_000  # of the safetensors library
MAX_PROBLEMS = 5
MAX_PROBLEM_LENGTH = 700

ITEM_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "uint8": 1,
    "bool": 1,
}

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$")]
TensorName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/-]{0,499}$")]
Checksum = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Size = Annotated[int, Field(ge=0, le=2**60)]
Shape = Annotated[tuple[Size, ...], Field(max_length=8)]
DType = Literal["float64", "int64", "float32", "int32", "bfloat16", "float16", "uint8", "bool"]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Chunk(Record):
    """Rectangle [start, start + shape) of a tensor, at bytes [offset, offset + bytes) of `file`."""

    file: FileName
    start: Shape
    shape: Shape
    offset: Size
    bytes: Size
    checksums: tuple[Checksum, ...]
    """One for each block of `block_bytes`; the last block may be shorter."""

    @property
    def rectangle(self) -> Rectangle:
        return Rectangle(self.start, self.shape)


class TensorEntry(Record):
    shape: Shape
    dtype: DType
    chunks: tuple[Chunk, ...]


class ShardFile(Record):
    bytes: Size
    header_bytes: Annotated[int, Field(ge=8, le=MAX_HEADER_BYTES)]
    """The safetensors header with its length field: the first chunk starts here."""
    header_checksum: Checksum


class ExtraFile(Record):
    bytes: Annotated[int, Field(ge=0, le=MAX_EXTRA_BYTES)]
    checksum: Checksum


class Manifest(Record):
    format: Literal["megapipe-checkpoint"] = "megapipe-checkpoint"
    version: Literal[1, 2] = 2
    megapipe: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.+-]{1,100}$")]
    step: Annotated[int, Field(ge=0, lt=10**18)] | None
    """None for a checkpoint of weights alone."""
    block_bytes: Annotated[int, Field(ge=BLOCK_BYTES, le=BLOCK_BYTES)] = BLOCK_BYTES
    state: dict[str, JsonValue]
    files: dict[FileName, ExtraFile]
    shards: dict[FileName, ShardFile]
    tensors: dict[TensorName, TensorEntry]

    def problems(self) -> Iterator[str]:
        """What is wrong between the fields: sizes, bounds, gaps and overlaps."""
        if self.step is None:
            yield from self._weights_problems()
        for name in sorted({*self.files, *self.shards} & {MANIFEST_NAME} | self._in_both()):
            yield f"file name {name} is used twice"
        chunks_of: dict[str, list[Chunk]] = {name: [] for name in self.shards}
        for name, entry in self.tensors.items():
            yield from (f"tensor {name}: {problem}" for problem in _tensor_problems(entry))
            for chunk in entry.chunks:
                if chunk.file in chunks_of:
                    chunks_of[chunk.file].append(chunk)
                else:
                    yield f"tensor {name}: its file {chunk.file} is not among the shards"
        for file, chunks in chunks_of.items():
            yield from _file_problems(file, self.shards[file], chunks)

    def _weights_problems(self) -> Iterator[str]:
        if self.version == 1:
            yield "step: null is not allowed in format version 1"
        for name in self.tensors:
            if not name.startswith(WEIGHTS_PREFIX):
                yield f"tensor {name}: without a step there may only be {WEIGHTS_PREFIX}..."

    def _in_both(self) -> set[str]:
        return self.files.keys() & self.shards.keys()


def _tensor_problems(entry: TensorEntry) -> Iterator[str]:
    whole = Rectangle.whole(entry.shape)
    for chunk in entry.chunks:
        if not len(chunk.start) == len(chunk.shape) == len(entry.shape):
            yield f"a chunk of rank {len(chunk.shape)} in a tensor of rank {len(entry.shape)}"
            return
        if not whole.contains(chunk.rectangle):
            yield f"chunk {chunk.rectangle} lies outside its shape {list(entry.shape)}"
            return
        if chunk.bytes != chunk.rectangle.volume * ITEM_BYTES[entry.dtype]:
            size = counted(chunk.bytes, "byte")
            yield f"chunk {chunk.rectangle} of {entry.dtype} can't have {size}"
        if len(chunk.checksums) != math.ceil(chunk.bytes / BLOCK_BYTES):
            yield f"chunk {chunk.rectangle} has {len(chunk.checksums)} checksums"
    rectangles = [chunk.rectangle for chunk in entry.chunks]
    if covers(whole, rectangles):
        return
    gap = first_gap(whole, rectangles)
    if gap:
        yield f"no chunk holds {gap} of its shape {list(entry.shape)}"
    overlap = first_overlap(rectangles)
    if overlap:
        yield f"chunks {overlap[0]} and {overlap[1]} overlap"


def _file_problems(name: str, file: ShardFile, chunks: list[Chunk]) -> Iterator[str]:
    """The chunks of a shard file must tile it from the end of its header to its end."""
    position = file.header_bytes
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        if chunk.offset != position:
            kind = "overlap" if chunk.offset < position else "leave a gap"
            yield f"file {name}: chunks {kind} at byte {chunk.offset}"
            return
        position += chunk.bytes
    if position != file.bytes:
        yield f"file {name}: its chunks end at byte {position}, the file at byte {file.bytes}"


def build(fields: dict[str, object]) -> Manifest:
    """A manifest from fields of plain JSON. Raises CheckpointError when they don't fit."""
    try:
        return Manifest.model_validate_json(json.dumps(fields, allow_nan=False))
    except ValidationError as error:
        raise CheckpointError(_list(_sentences(error))) from error


def encode(manifest: Manifest) -> bytes:
    """The manifest file's bytes. Raises CheckpointError when `decode` would refuse them."""
    text = json.dumps(manifest.model_dump(), allow_nan=False, separators=(",", ":"))
    content = text.encode("ascii")[:-1]
    data = content + _seal(content)
    decode(data)
    return data


def decode(data: bytes) -> Manifest:
    """Strictly the inverse of `encode`. Raises CheckpointError without the file's name."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{len(data)} bytes, more than the {MAX_MANIFEST_BYTES} allowed")
    length = len(_seal(b""))
    content, seal = data[:-length], data[-length:]
    if seal != _seal(content):
        raise CheckpointError("the bytes are not the ones that were written (checksum differs)")
    try:
        probe = _Probe.model_validate_json(content + b"}")
        if probe.format == FORMAT and probe.version > VERSION:
            raise CheckpointError(
                f"format version {probe.version} is newer than this megapipe reads ({VERSION}); "
                "upgrade megapipe"
            )
        manifest = Manifest.model_validate_json(content + b"}")
    except ValidationError as error:
        raise CheckpointError(_list(_sentences(error))) from error
    problems = list(manifest.problems())
    if problems:
        raise CheckpointError(_list(problems))
    return manifest


def recorded_checksum(data: bytes) -> str:
    """The checksum that a manifest's file ends with, which names the checkpoint it is of."""
    return data[-len(_seal(b"")) :].decode("ascii").split('"')[3]


class _Probe(BaseModel):
    """What every version has: read first, so that a newer format is called by its name."""

    format: str
    version: int


def _seal(content: bytes) -> bytes:
    return b',"checksum":"' + checksum(content).encode() + b'"}\n'


def _sentences(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]


def _list(problems: list[str]) -> str:
    # Names in a forged manifest may hold what a terminal would obey.
    shown = "; ".join(
        (one if one.isprintable() else ascii(one))[:MAX_PROBLEM_LENGTH]
        for one in problems[:MAX_PROBLEMS]
    )
    more = len(problems) - MAX_PROBLEMS
    return f"{shown}; and {counted(more, 'more problem')}" if more > 0 else shown
