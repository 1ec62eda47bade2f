"""The `.metadata` of a distributed checkpoint: which chunks there are, and where each lies.

It is a pickle of torch.distributed.checkpoint's Metadata. Each chunk is a zip file of torch.save's
inside a larger file; it is opened when it is read.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path

from megapipe.amounts import counted
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.storage import read_small
from megapipe.conversion.megatron.archive import ByteSpan, open_archive, whole_file
from megapipe.conversion.megatron.assembly import GlobalTensor, TensorPart
from megapipe.conversion.megatron.records import (
    InertRecord,
    StoredTensor,
    are_sizes,
    is_name,
    is_size,
)
from megapipe.conversion.megatron.unpickler import MAX_PICKLE_BYTES, unpickle
from megapipe.conversion.strided import StridedTensor
from megapipe.errors import CheckpointError
from megapipe.files import shown

METADATA = ".metadata"
PLANS = "all_local_plans"
"""The last field of Megatron's `.metadata`: how each rank saved. Twice the size of the rest."""
MAX_CHUNKS = 100_000
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

ChunkKey = tuple[str, tuple[int, ...]]
"""Name of the tensor, and where in it the chunk starts."""


def read_metadata(directory: Path) -> tuple[dict[str, GlobalTensor], dict[str, ByteSpan]]:
    """The tensors that `.metadata` lists, under their names there, and where other objects lie.

    Raises CheckpointError, also where a file is missing or too short.
    """
    path = directory / METADATA
    root = unpickle(read_small(path, MAX_PICKLE_BYTES), str(path), end_at=PLANS)
    fields = root.values() if isinstance(root, InertRecord) else root
    if not isinstance(fields, dict):
        fields = {}
    listed, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds no Metadata of torch.distributed.checkpoint")
    places, objects = _places(path, stored)
    _check_files([*places.values(), *objects.values()])
    reader = _MetadataReader(directory, places)
    tensors: dict[str, GlobalTensor] = {}
    for name, entry in listed.items():
        if not is_name(name) or not isinstance(entry, InertRecord):
            raise CheckpointError(f"{path} lists a tensor under no printable name")
        if entry.name == "TensorStorageMetadata":
            tensors[name] = reader.tensor(name, entry)
    return tensors, objects


def _places(
    path: Path, stored: dict[object, object]
) -> tuple[dict[ChunkKey, ByteSpan], dict[str, ByteSpan]]:
    """Where each chunk lies, by its tensor and start, and each object. `stored` is emptied on the
    way, so that not both are in memory."""
    if len(stored) > MAX_CHUNKS:
        raise CheckpointError(f"{path} lists {len(stored)} chunks, more than {MAX_CHUNKS}")
    chunks: dict[ChunkKey, ByteSpan] = {}
    files: dict[str, Path] = {}
    objects: dict[str, ByteSpan] = {}
    while stored:
        index, info = stored.popitem()
        key = index.values() if isinstance(index, InertRecord) else {}
        name, start = key.get("fqn"), key.get("offset")
        if not is_name(name):
            raise CheckpointError(f"{path} has a chunk of a tensor without a printable name")
        where = f"{path}: {name}"
        file, offset, length = _range(where, info.values() if isinstance(info, InertRecord) else {})
        place = ByteSpan(files.setdefault(file, path.parent / file), offset, length)
        if start is None:
            objects[name] = place
        elif not are_sizes(start) or (name, start) in chunks:
            raise CheckpointError(f"{where} has two chunks in one place, or one without a place")
        else:
            chunks[name, start] = place
    return chunks, objects


def _range(where: str, fields: Mapping[str, object]) -> tuple[str, int, int]:
    """File, offset and length that torch's _StorageInfo names."""
    file, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if fields.get("transform_descriptors"):
        raise CheckpointError(f"{where} was compressed or transformed, which is not read")
    if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
        raise CheckpointError(
            f"{where} lies in {shown(str(file))[:200]!r}, which is no name of a file beside it"
        )
    if not is_size(offset) or not is_size(length):
        raise CheckpointError(f"{where} lies at no range of bytes of {file}")
    return file, offset, length


def _check_files(places: Iterable[ByteSpan]) -> None:
    """Raise CheckpointError for the first file that is missing or too short."""
    ends: dict[Path, int] = {}
    for place in places:
        ends[place.path] = max(ends.get(place.path, 0), place.offset + place.size)
    for path, end in sorted(ends.items()):
        size = whole_file(path).size
        if size < end:
            raise CheckpointError(
                f"{path} has {counted(size, 'byte')}, {METADATA} says at least {end}: it was cut "
                "off. Copy it again."
            )


class _MetadataReader:
    """Makes global tensors of the records of `.metadata`."""

    def __init__(self, directory: Path, places: Mapping[ChunkKey, ByteSpan]) -> None:
        self.directory = directory
        self.places = places
        self.chunks = 0
        self.locate = lru_cache(maxsize=1024)(self._locate)

    def tensor(self, name: str, entry: InertRecord) -> GlobalTensor:
        where = f"{self.directory / METADATA}: tensor {name}"
        fields = entry.values()
        size, chunks, dtype = fields.get("size"), fields.get("chunks"), _dtype(fields)
        if not are_sizes(size) or not isinstance(chunks, list) or dtype is None:
            raise CheckpointError(f"{where} has no shape, dtype or chunks")
        self.chunks += len(chunks)
        if self.chunks > len(self.places):
            raise CheckpointError(f"{where} has more chunks than are stored")
        return GlobalTensor(
            size, dtype, tuple(self.part(where, name, dtype, chunk, len(size)) for chunk in chunks)
        )

    def part(self, where: str, name: str, dtype: str, chunk: object, dims: int) -> TensorPart:
        fields = chunk.values() if isinstance(chunk, InertRecord) else {}
        start, shape = fields.get("offsets"), fields.get("sizes")
        if not are_sizes(start) or not are_sizes(shape) or not len(start) == len(shape) == dims:
            raise CheckpointError(f"{where} has a chunk without a start and shape of its rank")
        place = self.places.get((name, start))
        if place is None:
            raise CheckpointError(f"{where}: the chunk at {list(start)} lies in no file")
        return TensorPart(Rectangle(start, shape), partial(self.locate, place, dtype, shape))

    def _locate(self, span: ByteSpan, dtype: str, shape: tuple[int, ...]) -> StridedTensor:
        """Open the zip file of a chunk."""
        archive = open_archive(span)
        stored = archive.content
        if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (dtype, shape):
            raise CheckpointError(
                f"{span.path}: at byte {span.offset} there is no {dtype} tensor of {list(shape)}, "
                f"as {METADATA} says"
            )
        return archive.tensor(stored)


def _dtype(fields: Mapping[str, object]) -> str | None:
    """The dtype of `TensorProperties`, the first of what it keeps."""
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, InertRecord) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    return dtype.name if isinstance(dtype, InertRecord) and dtype.module == "torch" else None
