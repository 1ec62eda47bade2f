"""Directories for ranks hold what Megatron would have written there."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapipe.conversion.megatron import writer
from megapipe.conversion.megatron.directory import open_megatron
from megapipe.conversion.megatron.writer import RankGrid, write_rank_directories
from megapipe.errors import CheckpointError
from tests.conversion.megatron.samples import Weights, save_ranks, weights

ARGUMENTS = {"num_layers": 4, "transformer_impl": "local"}


class InMemory:
    """A model whose tensors are at hand."""

    def __init__(self, tensors: Weights) -> None:
        self.tensors = tensors
        self.most = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(
        self, name: str, start: Sequence[int], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        part = self.tensors[name]
        for dim, (begin, count) in enumerate(zip(start, shape, strict=True)):
            part = part.narrow(dim, begin, count)
        self.most = max(self.most, part.numel() * dtype.itemsize)
        return part.to(dtype)


def write(directory: Path, model: Any, *grid: int, **others: Any) -> Path:
    directory.mkdir()
    dtype = others.pop("dtype", torch.float32)
    write_rank_directories(directory, model, RankGrid(*grid), ARGUMENTS | others, dtype)
    return directory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 2, 2)])
def test_each_rank_holds_what_megatron_gives_it(
    tmp_path: Path, grid: tuple[int, int, int], tied: bool
) -> None:
    whole = weights(tied=tied)
    found = write(tmp_path / "found", InMemory(whole), *grid) / "release"
    expected = save_ranks(tmp_path / "expected", whole, *grid)
    files = sorted(file.relative_to(expected) for file in expected.rglob("*.pt"))
    assert files == sorted(file.relative_to(found) for file in found.rglob("*.pt"))
    for file in files:
        with torch.serialization.safe_globals([argparse.Namespace]):
            one = torch.load(found / file)  # without running anything else
        other = torch.load(expected / file, weights_only=False)
        assert one.keys() == other.keys()
        for key in (key for key in one if key.startswith("model")):
            other[key] = {k: v for k, v in other[key].items() if not k.endswith("_extra_state")}
            assert one[key].keys() == other[key].keys()
            assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


def test_another_grid_and_dtype_read_back(tmp_path: Path) -> None:
    whole = weights(8)
    source = open_megatron(save_ranks(tmp_path / "source", whole, 2, 2))
    others = {"num_layers": 8, "transformer_impl": "transformer_engine"}
    path = write(tmp_path / "out", source, 4, 2, 2, dtype=torch.bfloat16, **others)
    found = open_megatron(path)
    assert (found.path, found.iteration) == (path / "release", 0)
    assert found.arguments["tensor_model_parallel_size"] == 4
    assert found.arguments["virtual_pipeline_model_parallel_size"] == 2
    for name, tensor in whole.items():
        assert torch.equal(found.read(name), tensor.bfloat16())


def test_large_tensors_are_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PIECE_BYTES", 100)
    whole = weights()
    model = InMemory(whole)
    found = open_megatron(write(tmp_path / "out", model, 2, 2))
    assert model.most < 100
    for name, tensor in whole.items():
        assert torch.equal(found.read(name), tensor)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ((1, 3, 1), "4 layers can't be dealt to 3 pipeline stages"),
        ((1, 2, 4), "with 4 parts each"),
        ((1, 1, 2), "need at least two pipeline stages"),
        ((3, 1, 1), r"word_embeddings.weight of shape \[16, 8\] can't be cut into 3 equal parts"),
    ],
)
def test_what_can_not_be_cut_is_refused_before_anything_is_written(
    tmp_path: Path, grid: tuple[int, int, int], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        write(tmp_path / "out", InMemory(weights()), *grid)
    assert list((tmp_path / "out").iterdir()) == []
