"""Core's distributed checkpoints ("torch_dist"): global tensors cut into chunks.

    metadata.json    that it is one, and of which version
    .metadata        a pickle of torch.distributed.checkpoint: shapes, chunks, where each chunk lies
    __0_1.distcp     chunks one after the other, each a zip file of torch.save's
    common.pt        what is the same on all ranks: Megatron's arguments, the iteration

Megatron stacks what equal layers hold: `decoder.layers.mlp.linear_fc2.weight` has a first dimension
over the layers. Here each layer has tensors of its own, as if its number stood in the name.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megapipe.amounts import counted
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.storage import read_small
from megapipe.conversion.megatron.archive import ByteSpan, open_archive, whole_file
from megapipe.conversion.megatron.assembly import GlobalTensor, TensorPart, joined, unstacked
from megapipe.conversion.megatron.records import InertRecord, StoredTensor, are_sizes, is_size
from megapipe.conversion.megatron.strided import StridedTensor
from megapipe.conversion.megatron.unpickler import MAX_PICKLE_BYTES, unpickle
from megapipe.errors import CheckpointError
from megapipe.files import shown

METADATA = ".metadata"
PLANS = "all_local_plans"
"""The last field of Megatron's `.metadata`: how each rank saved. Twice the size of the rest."""
CONFIG = "metadata.json"
COMMON = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
"""Where core 0.17 and later keep what `common.pt` was for."""
MAX_CONFIG_BYTES = 2**16
MAX_CHUNKS = 250_000
MAX_LAYERS = 10_000
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
STACKED = re.compile(r"(.*\blayers)\.(?!\d)(.+)")
"""A tensor over all layers: the layer's number is not in its name."""
HALVES = ("_w", "_v")
"""Endings of the gate's and the other half of a gated MLP, where they are saved as two tensors."""

ChunkKey = tuple[str, tuple[int, ...]]
"""Name of the tensor, and where in it the chunk starts."""
Place = tuple[str, int, int]
"""File, offset and length of a chunk."""


@dataclass(frozen=True, slots=True)
class DistributedContents:
    """What an `iter_...` directory holds: all tensors, and the objects of `common.pt`."""

    tensors: dict[str, GlobalTensor]
    common: Mapping[object, object]
    objects: tuple[str, ...]
    """Names of what was saved as bytes: states of random generators, of some optimizers."""


def read_distributed(directory: Path) -> DistributedContents:
    """Read where everything lies. Raises CheckpointError."""
    _check_format(directory)
    tables, objects = _tables(directory)
    tensors: dict[str, GlobalTensor] = {}
    for name, tensor in tables.items():
        try:
            tensor.check()
        except CheckpointError as error:
            raise CheckpointError(f"{directory / METADATA}: tensor {name}: {error}") from None
        for one, part in _by_layer(name, tensor):
            if one in tensors:
                raise CheckpointError(f"{directory / METADATA} has tensor {one} twice")
            tensors[one] = part
    return DistributedContents(
        _with_joined_halves(tensors), _common(directory, objects), tuple(objects)
    )


def _check_format(directory: Path) -> None:
    if not (directory / CONFIG).exists():
        raise CheckpointError(
            f"{directory} has {METADATA} and no {CONFIG}: a checkpoint of torch's own "
            '("torch_dcp" or "fsdp_dtensor"), which is not read. Save it with '
            "--ckpt-format torch_dist."
        )
    try:
        config = json.loads(read_small(directory / CONFIG, MAX_CONFIG_BYTES))
        backend, version = config["sharded_backend"], config.get("sharded_backend_version", 1)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{directory / CONFIG} is not what Megatron writes") from None
    if (backend, version) != ("torch_dist", 1):
        raise CheckpointError(
            f"{directory / CONFIG}: format {shown(str(backend))[:99]!r} of version "
            f'{shown(str(version))[:99]} is not read, only "torch_dist" of version 1. Load and '
            "save it with Megatron and --ckpt-format torch_dist."
        )


def _common(directory: Path, objects: Mapping[str, Place]) -> Mapping[object, object]:
    """What is the same on all ranks: in a file of its own, or in a list of one among the objects."""
    if COMMON_OBJECT in objects:
        file, offset, length = objects[COMMON_OBJECT]
        span = ByteSpan(directory / file, offset, length)
        listed = open_archive(span).content
        content = listed[0] if isinstance(listed, list) and len(listed) == 1 else None
    else:
        span = whole_file(directory / COMMON)
        content = open_archive(span).content
    if not isinstance(content, dict):
        raise CheckpointError(f"{span.path} holds no dict where Megatron's arguments should be")
    return content


def _tables(directory: Path) -> tuple[dict[str, GlobalTensor], dict[str, Place]]:
    """The tensors that `.metadata` lists, under their names there, and where objects lie."""
    path = directory / METADATA
    root = unpickle(read_small(path, MAX_PICKLE_BYTES), str(path), end_at=PLANS)
    fields = root.values() if isinstance(root, InertRecord) else root
    if not isinstance(fields, dict):
        fields = {}
    listed, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds no Metadata of torch.distributed.checkpoint")
    places, objects = _places(path, stored)
    _check_files(directory, [*places.values(), *objects.values()])
    reader = _MetadataReader(directory, places)
    tensors: dict[str, GlobalTensor] = {}
    for name, entry in listed.items():
        if not isinstance(name, str) or not isinstance(entry, InertRecord):
            raise CheckpointError(f"{path} names a tensor by something else than text")
        if entry.name == "TensorStorageMetadata":
            tensors[name] = reader.tensor(name, entry)
    return tensors, objects


def _places(
    path: Path, stored: dict[object, object]
) -> tuple[dict[ChunkKey, Place], dict[str, Place]]:
    """Where each chunk lies, by its tensor and start, and each object. `stored` is emptied on the
    way, so that not both are in memory."""
    if len(stored) > MAX_CHUNKS:
        raise CheckpointError(f"{path} lists {len(stored)} chunks, more than {MAX_CHUNKS}")
    chunks: dict[ChunkKey, Place] = {}
    objects: dict[str, Place] = {}
    while stored:
        index, info = stored.popitem()
        key = index.values() if isinstance(index, InertRecord) else {}
        name, start = key.get("fqn"), key.get("offset")
        if not isinstance(name, str):
            raise CheckpointError(f"{path} has a chunk of no tensor")
        where = f"{path}: {shown(name)[:200]}"
        place = _place(where, info.values() if isinstance(info, InertRecord) else {})
        if start is None:
            objects[name] = place
        elif not are_sizes(start) or (name, start) in chunks:
            raise CheckpointError(f"{where} has two chunks in one place, or one without a place")
        else:
            chunks[name, start] = place
    return chunks, objects


def _place(where: str, fields: Mapping[str, object]) -> Place:
    """The range of a file that torch's _StorageInfo names."""
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


def _check_files(directory: Path, places: Iterable[Place]) -> None:
    """Raise CheckpointError for the first file that is missing or too short."""
    ends: dict[str, int] = {}
    for file, offset, length in places:
        ends[file] = max(ends.get(file, 0), offset + length)
    for file, end in sorted(ends.items()):
        size = whole_file(directory / file).size
        if size < end:
            raise CheckpointError(
                f"{directory / file} has {counted(size, 'byte')}, {METADATA} says at least {end}: "
                "it was cut off. Copy it again."
            )


class _MetadataReader:
    """Makes global tensors of the records of `.metadata`."""

    def __init__(self, directory: Path, places: Mapping[ChunkKey, Place]) -> None:
        self.directory = directory
        self.places = places
        self.chunks = 0
        self.locate = lru_cache(maxsize=1024)(self._locate)

    def tensor(self, name: str, entry: InertRecord) -> GlobalTensor:
        where = f"{self.directory / METADATA}: tensor {shown(name)[:200]}"
        fields = entry.values()
        size, chunks, dtype = fields.get("size"), fields.get("chunks"), _dtype(fields)
        if not are_sizes(size) or not isinstance(chunks, list) or dtype is None:
            raise CheckpointError(f"{where} has no shape, dtype or chunks")
        self.chunks += len(chunks)
        if self.chunks > MAX_CHUNKS:
            raise CheckpointError(f"{where}: more than {MAX_CHUNKS} chunks")
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
        return TensorPart(Rectangle(start, shape), lambda: self.locate(place, dtype, shape))

    def _locate(self, place: Place, dtype: str, shape: tuple[int, ...]) -> StridedTensor:
        """Open the zip file of a chunk."""
        name, offset, length = place
        archive = open_archive(ByteSpan(self.directory / name, offset, length))
        stored = archive.content
        if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (dtype, shape):
            raise CheckpointError(
                f"{self.directory / name}: at byte {offset} there is no {dtype} tensor of "
                f"{list(shape)}, as {METADATA} says"
            )
        return archive.tensor(stored)


def _dtype(fields: Mapping[str, object]) -> str | None:
    """The dtype of `TensorProperties`, the first of what it keeps."""
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, InertRecord) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    return dtype.name if isinstance(dtype, InertRecord) and dtype.module == "torch" else None


def _by_layer(name: str, tensor: GlobalTensor) -> Iterator[tuple[str, GlobalTensor]]:
    """The tensor of each layer where one tensor stacks them."""
    stacked = STACKED.fullmatch(name)
    if stacked is None or not tensor.shape:
        yield name, tensor
        return
    if tensor.shape[0] > MAX_LAYERS or 0 in tensor.shape:
        raise CheckpointError(f"tensor {name} of shape {list(tensor.shape)} is not read")
    for number, layer in enumerate(unstacked(tensor)):
        yield f"{stacked[1]}.{number}.{stacked[2]}", layer


def _with_joined_halves(tensors: dict[str, GlobalTensor]) -> dict[str, GlobalTensor]:
    """Gate and up in one tensor, where they are two."""
    first, second = HALVES
    for name in [name for name in tensors if name.endswith(first)]:
        whole = name.removesuffix(first)
        if whole + second in tensors:
            tensors[whole] = joined(tensors.pop(name), tensors.pop(whole + second))
    return tensors
