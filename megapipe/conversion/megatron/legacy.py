"""Checkpoints with a directory for each rank, as Megatron-LM writes them with --ckpt-format torch.

    mp_rank_01/model_optim_rng.pt        of tensor-parallel rank 1, without pipeline parallelism
    mp_rank_01_003/model_optim_rng.pt    of pipeline stage 3

Each file holds what a rank had: `model`, or `model0`, `model1`, ... where it had several parts of
the pipeline (virtual stages), with layers numbered from 0 in each. The model begins with `model0`
of stage 0; then follow `model0` of the other stages, then `model1` of stage 0.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megapipe.amounts import counted
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.conversion.megatron.assembly import GlobalTensor, TensorPart
from megapipe.conversion.megatron.ranks import RankContents, RankPlace, read_ranks
from megapipe.conversion.megatron.sharing import (
    LAYER,
    SECOND,
    TIED_OUTPUT,
    is_gated,
    second_of_mlp,
    shared_dim,
)
from megapipe.conversion.strided import StridedTensor
from megapipe.errors import CheckpointError

OPTIMIZER_FILE = "distrib_optim.pt"


@dataclass(frozen=True, slots=True)
class RankDirectories:
    """What an `iter_...` directory of rank directories holds."""

    tensors: dict[str, GlobalTensor]
    arguments: dict[str, object]
    iteration: object
    optimizer: str | None
    """The format of the optimizer's state, by name; None where there is none."""


def read_rank_directories(directory: Path) -> RankDirectories:
    """Read where everything lies: the pickle of each rank, no tensors. Raises CheckpointError."""
    ranks = read_ranks(directory)
    first = ranks[0, 0]
    _check_arguments(directory, ranks, first.arguments)
    shards = _by_global_name(directory, ranks)
    if first.arguments.get("untie_embeddings_and_output_weights") is False:
        shards.pop(TIED_OUTPUT, None)
    tensors = {}
    for name, parts in shards.items():
        try:
            tensors[name] = _assembled(name, parts, shards)
            tensors[name].check()
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: tensor {name}: {error}") from None
    optimizer = first.optimizer
    paths = [rank.path for rank in ranks.values()]
    if any((path.parent / OPTIMIZER_FILE).exists() for path in paths):
        optimizer = f"distributed optimizer of the legacy layout ({OPTIMIZER_FILE})"
    return RankDirectories(tensors, first.arguments, first.iteration, optimizer)


def _check_arguments(
    directory: Path, ranks: Mapping[RankPlace, RankContents], arguments: Mapping[str, object]
) -> None:
    """Raise CheckpointError where the ranks that are there aren't those that the arguments say."""
    counts = {
        "tensor_model_parallel_size": 1 + max(tensor for tensor, _ in ranks),
        "pipeline_model_parallel_size": 1 + max(stage for _, stage in ranks),
        "expert_model_parallel_size": 1,
    }
    for key, count in counts.items():
        if arguments.get(key) not in (None, count):
            raise CheckpointError(
                f"{directory}: its arguments say {key} = {arguments[key]}, its directories {count}"
            )


def _by_global_name(
    directory: Path, ranks: Mapping[RankPlace, RankContents]
) -> dict[str, list[StridedTensor]]:
    """What each tensor-parallel rank holds of each tensor, with layers numbered over the model."""
    size = 1 + max(tensor for tensor, _ in ranks)
    stages = 1 + max(stage for _, stage in ranks)
    chunks = len(ranks[0, 0].chunks)
    shards: dict[str, list[StridedTensor]] = {}
    layers = 0
    for chunk, stage in itertools.product(range(chunks), range(stages)):
        held = []
        for tensor in range(size):
            rank = ranks[tensor, stage]
            if len(rank.chunks) != chunks:
                raise CheckpointError(f"{rank.path} holds {len(rank.chunks)} parts, not {chunks}")
            held.append(rank.chunks[chunk])
            if held[0].keys() != held[-1].keys():
                name = min(held[0].keys() ^ held[-1].keys())
                raise CheckpointError(f"{rank.path}: {name} is not on all ranks")
        for name in held[0]:
            whole = _renumbered(name, layers)
            if whole in shards:
                raise CheckpointError(f"{directory}: two stages hold {whole}")
            shards[whole] = [one[name] for one in held]
        layers += _layer_count(ranks[0, stage].path, held[0])
    _check_layers(directory, ranks[0, 0].arguments, layers)
    return shards


def _renumbered(name: str, layers: int) -> str:
    match = LAYER.fullmatch(name)
    return name if match is None else f"{match[1]}{int(match[2]) + layers}{match[3]}"


def _layer_count(path: Path, names: Iterable[str]) -> int:
    """How many layers a part of the model holds; they are numbered from 0 without a gap."""
    numbers = {int(match[2]) for name in names if (match := LAYER.fullmatch(name))}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"{path}: its layers are not numbered from 0 to {len(numbers) - 1}")
    return len(numbers)


def _check_layers(directory: Path, arguments: Mapping[str, object], layers: int) -> None:
    if arguments.get("num_layers") not in (None, layers):
        raise CheckpointError(
            f"{directory} has {counted(layers, 'layer')}, its arguments say num_layers = "
            f"{arguments['num_layers']}"
        )


def _assembled(
    name: str, parts: list[StridedTensor], shards: Mapping[str, list[StridedTensor]]
) -> GlobalTensor:
    """A global tensor out of what the tensor-parallel ranks hold of it."""
    first = parts[0]
    if any(part.dtype != first.dtype or len(part.shape) != len(first.shape) for part in parts):
        raise CheckpointError("it has another dtype or rank on some ranks")
    dim = None if len(parts) == 1 else shared_dim(name)
    if dim is None:
        if any(part.shape != first.shape for part in parts):
            raise CheckpointError("it should be the same on all ranks, but its shapes differ")
        return _tensor_of([first], 0)
    if dim >= len(first.shape):
        raise CheckpointError(f"ranks can't share dimension {dim} of its shape {first.shape}")
    second = second_of_mlp(name)
    if second is None or not _is_gated(first, shards.get(second)):
        return _tensor_of(parts, dim)
    halves = [_halves(part) for part in parts]
    return _tensor_of([half for side in zip(*halves, strict=True) for half in side], dim)


def _is_gated(first: StridedTensor, second: list[StridedTensor] | None) -> bool:
    if second is None or len(second[0].shape) != 2:
        raise CheckpointError(f"there is no {SECOND} beside it")
    return is_gated(first.shape[0], second[0].shape[1])


def _halves(part: StridedTensor) -> tuple[StridedTensor, StridedTensor]:
    """The upper and the lower half of the rows."""
    rows, *rest = part.shape
    shape, zeros = (rows // 2, *rest), [0] * len(rest)
    return part.part((0, *zeros), shape), part.part((rows // 2, *zeros), shape)


def _tensor_of(parts: list[StridedTensor], dim: int) -> GlobalTensor:
    """`parts` one behind the other along `dim`."""
    placed = []
    begin = 0
    for part in parts:
        start = [0] * len(part.shape)
        if start:
            start[dim] = begin
            begin += part.shape[dim]
        placed.append(TensorPart(Rectangle(tuple(start), part.shape), partial(_itself, part)))
    shape = list(parts[0].shape)
    if shape:
        shape[dim] = begin
    return GlobalTensor(tuple(shape), parts[0].dtype, tuple(placed))


def _itself(part: StridedTensor) -> StridedTensor:
    return part
