"""Checkpoints with a directory for each rank, as Megatron-LM writes them with --ckpt-format torch.

    mp_rank_01/model_optim_rng.pt        of tensor-parallel rank 1, without pipeline parallelism
    mp_rank_01_003/model_optim_rng.pt    of pipeline stage 3

Each file holds what a rank had: `model`, or `model0`, `model1`, ... where it had several parts of
the pipeline (virtual stages), with layers numbered from 0 in each. The model begins with `model0` of
stage 0; then follow `model0` of the other stages, then `model1` of stage 0.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megapipe.amounts import counted
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.conversion.megatron.archive import TorchArchive, open_archive, whole_file
from megapipe.conversion.megatron.assembly import GlobalTensor, TensorPart
from megapipe.conversion.megatron.plain import plain_arguments
from megapipe.conversion.megatron.records import StoredTensor
from megapipe.conversion.megatron.strided import StridedTensor
from megapipe.errors import CheckpointError
from megapipe.files import shown

RANK_DIRECTORY = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,5}))?")
RANK_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
MODEL_KEY = re.compile(r"model(\d{0,4})")
LAYER = re.compile(r"(.*\blayers\.)(\d{1,6})(\..+)")
MAX_RANKS = 4096
MAX_TENSORS = 200_000
EXTRA_STATE = "_extra_state"
OLDEST_VERSION = 2.0
"""`checkpoint_version` from which query, key and value lie as they do today."""

BY_ROWS = (
    "word_embeddings.weight",
    "output_layer.weight",
    "output_layer.bias",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_fc1.weight",
    "linear_fc1.bias",
)
BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
ON_ALL = (
    "position_embeddings.weight",
    "linear_proj.bias",
    "linear_fc2.bias",
    "norm.weight",
    "norm.bias",
    "norm_weight",
    "norm_bias",
)
"""How tensor-parallel ranks hold a tensor, by the end of its name."""
GATED = ("linear_fc1.weight", "linear_fc1.bias")
"""With a gated MLP each rank holds [its rows of the gate; its rows of the other half]."""

RankPlace = tuple[int, int]
"""Tensor-parallel and pipeline rank."""


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
    files = _rank_files(directory)
    ranks = {rank: _read_rank(path) for rank, path in files.items()}
    first = ranks[0, 0]
    _check_arguments(directory, ranks, first.arguments)
    shards = _by_global_name(directory, ranks)
    if first.arguments.get("untie_embeddings_and_output_weights") is False:
        shards.pop("output_layer.weight", None)  # the last stage's copy of the embedding
    tensors = {}
    for name, parts in shards.items():
        try:
            tensors[name] = _assembled(name, parts, shards)
            tensors[name].check()
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: tensor {name}: {error}") from None
    optimizer = first.optimizer
    if any((path.parent / OPTIMIZER_FILE).exists() for path in files.values()):
        optimizer = f"distributed optimizer of the legacy layout ({OPTIMIZER_FILE})"
    return RankDirectories(tensors, first.arguments, first.iteration, optimizer)


# --- Files ---------------------------------------------------------------------------------------


def _rank_files(directory: Path) -> dict[RankPlace, Path]:
    """The file of each rank; every rank of the grid has one."""
    found: dict[RankPlace, Path] = {}
    for path in sorted(directory.iterdir()):
        match = RANK_DIRECTORY.fullmatch(path.name)
        if match is None:
            if path.name.startswith("mp_rank_"):
                raise CheckpointError(
                    f"{path} is of a rank of expert parallelism or of another layout, which is not "
                    "read"
                )
            continue
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link")
        place = int(match[1]), int(match[2] or 0)
        if place in found:
            raise CheckpointError(f"{path} and {found[place].parent} are of the same rank")
        found[place] = path / RANK_FILE
    tensor, pipeline = (1 + max(place[dim] for place in found) for dim in (0, 1))
    if tensor * pipeline > MAX_RANKS:
        raise CheckpointError(f"{directory} is of more than {MAX_RANKS} ranks")
    for place in ((t, p) for p in range(pipeline) for t in range(tensor)):
        if place not in found:
            raise CheckpointError(
                f"{directory} lacks the directory of tensor-parallel rank {place[0]} on pipeline "
                f"stage {place[1]}: there are {tensor} ranks and {counted(pipeline, 'stage')}"
            )
    return found


@dataclass(frozen=True, slots=True)
class _RankContents:
    """What one rank's file holds: the tensors of each of its parts of the pipeline."""

    path: Path
    chunks: tuple[dict[str, StridedTensor], ...]
    arguments: dict[str, object]
    iteration: object
    optimizer: str | None


def _read_rank(path: Path) -> _RankContents:
    archive = open_archive(whole_file(path))
    content = archive.content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no dict")
    keys = [key for key in content if isinstance(key, str) and MODEL_KEY.fullmatch(key)]
    expected = ["model"] if keys == ["model"] else [f"model{n}" for n in range(len(keys))]
    if not keys or sorted(keys) != sorted(expected):
        raise CheckpointError(
            f"{path} holds {keys or 'no model'}, not model or model0, model1, ..."
        )
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, float | int) or version < OLDEST_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint_version {version} keeps query, key and value in another order, "
            "which is not read. Load and save it with Megatron-LM."
        )
    return _RankContents(
        path,
        tuple(_tensors(archive, key, content[key]) for key in expected),
        plain_arguments(content.get("args")),
        content.get("iteration"),
        "optimizer of the legacy layout" if content.get("optimizer") else None,
    )


def _tensors(archive: TorchArchive, key: str, model: object) -> dict[str, StridedTensor]:
    """The tensors of one part of the model, by Megatron's names; what is none of them is refused."""
    where = f"{archive.span.path}: {key}"
    if not isinstance(model, dict):
        raise CheckpointError(f"{where} is not a dict")
    if "language_model" in model:
        raise CheckpointError(
            f"{where} has a language_model: it was written before Megatron's models were those of "
            "megatron-core, which is not read. Convert it with Megatron-LM's tools/checkpoint."
        )
    if len(model) > MAX_TENSORS:
        raise CheckpointError(f"{where} holds more than {MAX_TENSORS} tensors")
    tensors = {}
    for name, value in model.items():
        if not isinstance(name, str) or name.endswith(EXTRA_STATE):
            continue
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f"{where}: {shown(name)[:200]} is not a tensor")
        tensors[name] = archive.tensor(value)
    return tensors


def _check_arguments(
    directory: Path, ranks: Mapping[RankPlace, _RankContents], arguments: Mapping[str, object]
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


# --- Tensors -------------------------------------------------------------------------------------


def _by_global_name(
    directory: Path, ranks: Mapping[RankPlace, _RankContents]
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
                raise CheckpointError(f"{rank.path}: {shown(name)[:200]} is not on all ranks")
        for name in held[0]:
            whole = _renumbered(name, layers)
            if whole in shards:
                raise CheckpointError(f"{directory}: two stages hold {shown(whole)[:200]}")
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
    if len(parts) == 1 or name.endswith(ON_ALL):
        if any(part.shape != first.shape for part in parts):
            raise CheckpointError("it should be the same on all ranks, but its shapes differ")
        return _tensor_of([first], 0)
    if name.endswith(BY_COLUMNS) and len(first.shape) == 2:
        return _tensor_of(parts, 1)
    if not name.endswith(BY_ROWS) or not first.shape:
        raise CheckpointError("it isn't known how tensor-parallel ranks share it")
    if not name.endswith(GATED) or not _is_gated(name, first, shards):
        return _tensor_of(parts, 0)
    halves = [_halves(part) for part in parts]
    return _tensor_of([half for side in zip(*halves, strict=True) for half in side], 0)


def _is_gated(name: str, part: StridedTensor, shards: Mapping[str, list[StridedTensor]]) -> bool:
    """Whether a first linear layer has twice the rows that the second one has columns."""
    second = shards.get(f"{name.rpartition('linear_fc1.')[0]}linear_fc2.weight")
    if second is None or len(second[0].shape) != 2:
        raise CheckpointError("there is no linear_fc2.weight beside it")
    times, rest = divmod(part.shape[0], max(1, second[0].shape[1]))
    if rest or times not in (1, 2):
        raise CheckpointError(
            f"{part.shape[0]} rows don't fit {second[0].shape[1]} columns of linear_fc2.weight"
        )
    return times == 2


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
