"""Wherever in a checkpoint a pickle lies, nothing in it is run."""

import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megapipe.conversion.megatron.directory import open_megatron
from megapipe.errors import CheckpointError
from tests.conversion.megatron.hostile import harmful
from tests.conversion.megatron.samples import save_distributed, save_ranks, weights

NAME = "decoder.final_layernorm.weight"


def archived(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)


def in_metadata(path: Path) -> Callable[[bytes], object]:
    return (save_distributed(path, weights(1)) / ".metadata").write_bytes


def in_common(path: Path) -> Callable[[bytes], object]:
    file = save_distributed(path, weights(1)) / "common.pt"
    return lambda content: archived(file, content)


def in_rank(path: Path) -> Callable[[bytes], object]:
    file = save_ranks(path, weights(1)) / "mp_rank_00/model_optim_rng.pt"
    return lambda content: archived(file, content)


def in_chunk(path: Path) -> Callable[[bytes], object]:
    """At the place of a tensor: it is opened when that is read."""

    def move(metadata: Any) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == NAME)
        metadata.storage_data[index] = _StorageInfo("chunk.distcp", 0, CHUNK_BYTES)

    file = save_distributed(path, weights(1), change=move) / "chunk.distcp"

    def write(content: bytes) -> None:
        archived(file, content)
        file.write_bytes(file.read_bytes().ljust(CHUNK_BYTES, b"\0"))
        with pytest.raises(CheckpointError, match=NAME):
            open_megatron(path).read(NAME)

    return write


CHUNK_BYTES = 2048


@pytest.mark.parametrize("where", [in_metadata, in_common, in_rank, in_chunk])
def test_nothing_is_run(tmp_path: Path, where: Callable[[Path], Callable[[bytes], object]]) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "run"
    write = where(path)
    for content in harmful(str(canary)).values():
        write(content)
        with suppress(CheckpointError):
            checkpoint = open_megatron(path)
            for name in checkpoint.tensors:
                checkpoint.read(name)
            for value in checkpoint.arguments.values():
                assert isinstance(value, str | int | float | list | dict | None)
        assert not canary.exists()
