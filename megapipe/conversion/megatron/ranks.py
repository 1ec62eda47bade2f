"""The files of the legacy layout: one for each rank, and what each holds."""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

from megapipe.amounts import counted
from megapipe.conversion.megatron.archive import TorchArchive, open_archive, whole_file
from megapipe.conversion.megatron.plain import plain_arguments
from megapipe.conversion.megatron.records import StoredTensor, is_name
from megapipe.conversion.strided import StridedTensor
from megapipe.errors import CheckpointError

RANK_DIRECTORY = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,5}))?")
RANK_FILE = "model_optim_rng.pt"
MODEL_KEY = re.compile(r"model(\d{0,4})")
MAX_RANKS = 4096
MAX_TENSORS = 200_000
"""Over all ranks."""
EXTRA_STATE = "_extra_state"
OLDEST_VERSION = 2.0
"""`checkpoint_version` from which query, key and value lie as they do today."""

RankPlace = tuple[int, int]
"""Tensor-parallel and pipeline rank."""


def rank_files(directory: Path) -> dict[RankPlace, Path]:
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
    if len(found) > MAX_RANKS:
        raise CheckpointError(f"{directory} is of more than {MAX_RANKS} ranks")
    ranks, stages = (1 + max(place[dim] for place in found) for dim in (0, 1))
    for place in itertools.product(range(ranks), range(stages)):
        if place not in found:
            raise CheckpointError(
                f"{directory} lacks the directory of tensor-parallel rank {place[0]} on pipeline "
                f"stage {place[1]}: there are {ranks} ranks and {counted(stages, 'stage')}"
            )
    return found


@dataclass(frozen=True, slots=True)
class RankContents:
    """What one rank's file holds: the tensors of each of its parts of the pipeline."""

    path: Path
    chunks: tuple[dict[str, StridedTensor], ...]
    arguments: dict[str, object]
    iteration: object
    optimizer: str | None


def read_ranks(directory: Path) -> dict[RankPlace, RankContents]:
    """The contents of every rank; arguments are those of the first. Raises CheckpointError."""
    ranks: dict[RankPlace, RankContents] = {}
    held = 0
    for place, path in sorted(rank_files(directory).items()):
        contents = _read_rank(path)
        ranks[place] = replace(contents, arguments=ranks[0, 0].arguments) if ranks else contents
        held += sum(map(len, contents.chunks))
        if held > MAX_TENSORS:
            raise CheckpointError(f"{directory} holds more than {MAX_TENSORS} tensors")
    return ranks


def _read_rank(path: Path) -> RankContents:
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
    return RankContents(
        path,
        tuple(_tensors(archive, key, content[key]) for key in expected),
        plain_arguments(content.get("args")),
        content.get("iteration"),
        "optimizer of the legacy layout" if content.get("optimizer") else None,
    )


def _tensors(archive: TorchArchive, key: str, model: object) -> dict[str, StridedTensor]:
    """The tensors of one part of the model, by Megatron's names."""
    where = f"{archive.span.path}: {key}"
    if not isinstance(model, dict):
        raise CheckpointError(f"{where} is not a dict")
    if "language_model" in model:
        raise CheckpointError(
            f"{where} has a language_model: it was written before Megatron's models were those of "
            "megatron-core, which is not read. Convert it with Megatron-LM's tools/checkpoint."
        )
    tensors = {}
    for name, value in model.items():
        if not is_name(name):
            raise CheckpointError(f"{where} has a tensor without a printable name")
        if name.endswith(EXTRA_STATE):
            continue
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f"{where}: {name} is not a tensor")
        tensors[name] = archive.tensor(value)
    return tensors
