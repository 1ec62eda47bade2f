"""Writes a model as Megatron-LM's --ckpt-format torch: a directory for each rank.

    latest_checkpointed_iteration.txt            "release": a model without optimizer state
    release/mp_rank_01_003/model_optim_rng.pt    of tensor-parallel rank 1 on pipeline stage 3

Follows `save_checkpoint` and `generate_state_dict` of megatron/training/checkpointing.py in
Megatron-LM (commit d98e8a64). torch.save writes each file with gaps for the tensors, which are then
filled piece by piece, so that no rank's part is in memory. The zip checksums of the gaps stay 0;
torch.load does not look at them.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.shard import as_bytes
from megapipe.conversion.kind import MEGATRON_TRACKER as TRACKER
from megapipe.conversion.megatron.archive import TorchArchive, open_archive, whole_file
from megapipe.conversion.megatron.records import StoredTensor
from megapipe.conversion.megatron.sharing import (
    LAYER,
    OWN_NORMS,
    TIED_OUTPUT,
    is_gated,
    second_of_mlp,
    shared_dim,
)
from megapipe.conversion.new_directory import FILE_MODE
from megapipe.errors import CheckpointError
from megapipe.files import sync_directory, write_all, write_durably

PIECE_BYTES = 64 * 2**20
"""The most values that are in memory at a time."""
EMBEDDING = "embedding."
WORDS = "embedding.word_embeddings.weight"
CHECKPOINT_VERSION = 3.0
RELEASE = "release"


class GlobalTensors(Protocol):
    """A model as global tensors under Megatron's names, as `MegatronCheckpoint` has them."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]: ...

    def read(
        self, name: str, start: Sequence[int], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Rectangle [start, start + shape) of a tensor, on the CPU."""
        ...


@dataclass(frozen=True)
class RankGrid:
    """How many ranks share a model: `tensor` the matrices, `pipeline` the layers, which each stage
    holds in `virtual` parts."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1

    @property
    def ranks(self) -> int:
        """How many have a directory."""
        return self.tensor * self.pipeline

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Stage and number of each part of the pipeline, in the order of the layers."""
        return [(stage, one) for one in range(self.virtual) for stage in range(self.pipeline)]


def write_rank_directories(
    directory: Path,
    model: GlobalTensors,
    grid: RankGrid,
    arguments: Mapping[str, object],
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `model` into the empty `directory`, with values rounded to `dtype`.

    `arguments` are Megatron's, in plain values; the sizes of the grid are added. With
    `transformer_impl = "local"` norms are named as megatron-core's own layers name them, otherwise
    as Transformer Engine's do. `progress` is called with the number of bytes after each
    write of that many. Raises CheckpointError where the model can't be cut that way, before
    anything is written.
    """
    plan = {
        (rank, stage): _rank_plan(model, grid, rank, stage, arguments)
        for stage in range(grid.pipeline)
        for rank in range(grid.tensor)
    }
    saved = argparse.Namespace(
        **{
            **arguments,
            "tensor_model_parallel_size": grid.tensor,
            "pipeline_model_parallel_size": grid.pipeline,
            "virtual_pipeline_model_parallel_size": grid.virtual if grid.virtual > 1 else None,
        }
    )
    for (rank, stage), chunks in plan.items():
        name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if grid.pipeline > 1 else "")
        target = directory / RELEASE / name
        target.mkdir(parents=True)
        _write_rank(target / "model_optim_rng.pt", model, chunks, saved, dtype, progress)
        sync_directory(target)
    sync_directory(directory / RELEASE)
    write_durably(directory / TRACKER, [RELEASE.encode()], FILE_MODE)


# --- What a rank holds ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shard:
    """A rank's part of a global tensor: rectangles of it, one below the other."""

    source: str
    rectangles: tuple[Rectangle, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.rectangles[0].shape
        if not first:
            return first
        return (sum(one.shape[0] for one in self.rectangles), *first[1:])


Chunk = dict[str, _Shard]
"""The tensors of a part of the pipeline, under the names that they have there."""


def _rank_plan(
    model: GlobalTensors, grid: RankGrid, rank: int, stage: int, arguments: Mapping[str, object]
) -> list[Chunk]:
    """The tensors of each of a rank's parts of the pipeline."""
    numbers = {int(match[2]) for name in model.shapes if (match := LAYER.fullmatch(name))}
    if grid.pipeline == 1 != grid.virtual:
        raise CheckpointError("several parts for each stage need at least two pipeline stages")
    if numbers != set(range(len(numbers))) or len(numbers) % len(grid.parts):
        raise CheckpointError(
            f"{len(numbers)} layers can't be dealt to {grid.pipeline} pipeline stages with "
            f"{grid.virtual} parts each: take numbers that divide them"
        )
    each = len(numbers) // len(grid.parts)
    own_norms = arguments.get("transformer_impl") == "local"
    chunks = []
    for virtual in range(grid.virtual):
        place = grid.parts.index((stage, virtual))
        layers = range(place * each, (place + 1) * each)
        chunk: Chunk = {}
        for name, source in _held(model, layers, place == 0, place == len(grid.parts) - 1):
            for own, fused in OWN_NORMS.items() if own_norms else ():
                name = name.replace(fused, own)
            chunk[name] = _shard(model, source, rank, grid.tensor)
        chunks.append(chunk)
    return chunks


def _held(
    model: GlobalTensors, layers: range, first: bool, last: bool
) -> Iterator[tuple[str, str]]:
    """The name in a part of the pipeline, and the global name, of each tensor there."""
    for name in model.shapes:
        match = LAYER.fullmatch(name)
        if match is None:
            if first if name.startswith(EMBEDDING) else last:
                yield name, name
        elif int(match[2]) in layers:
            yield f"{match[1]}{int(match[2]) - layers.start}{match[3]}", name
    if last and not first and TIED_OUTPUT not in model.shapes:
        yield TIED_OUTPUT, WORDS


def _shard(model: GlobalTensors, name: str, rank: int, ranks: int) -> _Shard:
    """What `rank` of `ranks` holds of a tensor."""
    shape = tuple(model.shapes[name])
    dim = shared_dim(name)
    if dim is None or ranks == 1:
        return _Shard(name, (Rectangle.whole(shape),))
    second = second_of_mlp(name)
    halves = 2 if second and is_gated(shape[0], model.shapes[second][1]) else 1
    size, rest = divmod(shape[dim], ranks * halves)
    if rest:
        raise CheckpointError(
            f"tensor {name} of shape {list(shape)} can't be cut into {ranks} equal parts along "
            f"dimension {dim}: take fewer tensor-parallel ranks"
        )
    rectangles = []
    for half in range(halves):
        start, part = [0] * len(shape), list(shape)
        start[dim], part[dim] = (half * ranks + rank) * size, size
        rectangles.append(Rectangle(tuple(start), tuple(part)))
    return _Shard(name, tuple(rectangles))


# --- Files ---------------------------------------------------------------------------------------


def _write_rank(
    path: Path,
    model: GlobalTensors,
    chunks: list[Chunk],
    arguments: argparse.Namespace,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None,
) -> None:
    """Write one rank's file, and return when it is on the disk."""
    keys = ["model"] if len(chunks) == 1 else [f"model{n}" for n in range(len(chunks))]
    content: dict[str, object] = {
        "args": arguments,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
    }
    for key, chunk in zip(keys, chunks, strict=True):
        # Memory that is never written to takes none.
        content[key] = {name: torch.empty(s.shape, dtype=dtype) for name, s in chunk.items()}
    with torch.serialization.skip_data():
        torch.save(content, path)
    archive = open_archive(whole_file(path))
    assert isinstance(archive.content, dict)
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for key, chunk in zip(keys, chunks, strict=True):
            for name, shard in chunk.items():
                os.lseek(descriptor, _offset(archive, archive.content[key][name]), os.SEEK_SET)
                for piece in _pieces(model, shard, dtype):
                    write_all(descriptor, [as_bytes(piece).numpy().data])
                    if progress is not None:
                        progress(piece.nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _offset(archive: TorchArchive, stored: StoredTensor) -> int:
    return archive.tensor(stored).offset


def _pieces(model: GlobalTensors, shard: _Shard, dtype: torch.dtype) -> Iterator[Tensor]:
    """The values of a shard in order, at most about `PIECE_BYTES` at a time."""
    for rectangle in shard.rectangles:
        if not rectangle.shape:
            yield model.read(shard.source, (), (), dtype)
            continue
        count, *rest = rectangle.shape
        rows = max(1, PIECE_BYTES // (math.prod(rest) * dtype.itemsize))
        for begin in range(0, count, rows):
            start = (rectangle.start[0] + begin, *rectangle.start[1:])
            shape = (min(rows, count - begin), *rest)
            yield model.read(shard.source, start, shape, dtype).contiguous()
