"""Averages of checkpoints: their values, what they keep, and what has none."""

import math
import re
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapipe.checkpoint import merge as merge_module
from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.checkpoint.merge import merge_checkpoints, newest_checkpoints, round_once
from megapipe.checkpoint.save import save_checkpoint
from megapipe.checkpoint.shard import Shard
from megapipe.config import ModelConfig
from megapipe.conversion.open import model_of
from megapipe.errors import CheckpointError
from megapipe.models.families import FAMILIES
from tests.checkpoint.samples import random_tensor, same_bits, save_sample_weights

SHAPE = "num_layers = 1\nhidden_size = 8\nnum_heads = 2\nvocab_size = 9\nmax_sequence_length = 4\n"
TOML = f"[model]\n{SHAPE}".encode()


def read_model(reader: CheckpointReader) -> ModelConfig:
    return model_of(reader, FAMILIES)


def save(target: Path, tensors: dict[str, Tensor], **options: Any) -> Path:
    return save_sample_weights(target, tensors, **{"model_toml": TOML, **options})


def average(paths: list[Path], target: Path, **options: Any) -> CheckpointReader:
    done: list[int] = []
    path = merge_checkpoints(
        paths, target, read_model, lambda what, total: nullcontext(done.append), **options
    )
    reader = open_checkpoint(path)
    assert reader.verify() == []
    return reader


def test_the_average_of_runs_is_rounded_once_and_says_what_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module.slices, "__defaults__", (7,))
    tensors = [random_weights(seed) for seed in range(3)]
    files: dict[str, bytes | Path] = {"config.toml": TOML + b"[train]\n", "tokenizer.json": b"{}"}
    for step, values in enumerate(tensors):
        shards = [
            Shard(f"{kind}/w", (5, 4), (0, 0), values * factor)
            for kind, factor in (("weights", 1.0), ("exp_avg", 2.0))
        ]
        save_checkpoint(tmp_path / "checkpoints", step, shards, state={"tokens": 5}, files=files)
    paths = newest_checkpoints(tmp_path, 3)
    assert [path.name[-1] for path in paths] == ["0", "1", "2"]
    reader = average(paths, tmp_path / "mean", shares=[1.0, 2.0, 0.5])
    assert (reader.step, reader.names) == (None, ("weights/w",))
    assert read_model(reader) == read_model(open_checkpoint(paths[0]))
    assert set(reader.config) == {"model"}
    assert reader.read_file("tokenizer.json") == b"{}"
    a, b, c = (one.double() for one in tensors)
    assert torch.equal(reader.read("weights/w"), ((a + 2 * b + 0.5 * c) / 3.5).float())
    merged = reader.state["merged"]
    assert [(one["path"], one["step"]) for one in merged] == [
        (str(p), i) for i, p in enumerate(paths)
    ]
    assert [one["share"] for one in merged] == [1 / 3.5, 2 / 3.5, 0.5 / 3.5]
    recorded = re.findall(r'"checksum":"(\w+)"}\n$', (paths[0] / "manifest.json").read_text())
    assert [merged[0]["checksum"]] == recorded


def random_weights(seed: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_average_of_one_or_of_equals_is_that_bit_by_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    values = {"bits": random_tensor((4, 6), dtype), "scalar": torch.tensor(-0.0, dtype=dtype)}
    one = save(tmp_path / "one", values, state={"origin": {"stack": "other"}})
    alone = average([one], tmp_path / "alone")
    for name, tensor in values.items():
        assert same_bits(alone.read(f"weights/{name}"), tensor)
    finite = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    two = save(tmp_path / "two", {"bits": finite, "scalar": values["scalar"]})
    twice = average([two, two, two], tmp_path / "twice")
    assert same_bits(twice.read("weights/bits"), finite)
    assert same_bits(twice.read("weights/scalar"), values["scalar"])
    assert alone.state["origin"] == {"stack": "other"}
    assert "origin" not in average([one, two], tmp_path / "both").state


def test_the_widest_dtype_is_kept(tmp_path: Path) -> None:
    narrow = save(tmp_path / "narrow", {"w": torch.ones(2).bfloat16()})
    wide = save(tmp_path / "wide", {"w": torch.full((2,), 1.001)})
    reader = average([narrow, wide], tmp_path / "mean")
    assert reader.dtype("weights/w") == torch.float32
    assert reader.read("weights/w").tolist() == [pytest.approx(1.0005, rel=1e-7)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    """To the nearest neighbour by exact arithmetic, right beside the middle between two as well."""
    low = torch.tensor([1.0, 1.5, -3.0, 2.0**-9, 6e-8, -0.0]).to(dtype)
    up = torch.nextafter(low, torch.tensor(math.inf, dtype=dtype))
    middle = (low.double() + up.double()) / 2
    values = torch.cat([middle * (1 + error) for error in (0.0, 1e-12, -1e-12, 1e-5)])
    found = round_once(values, dtype).tolist()
    for value, rounded, one, other in zip(
        values.tolist(), found, (low.tolist() * 4), (up.tolist() * 4), strict=True
    ):
        nearest = min(abs(Fraction(one) - Fraction(value)), abs(Fraction(other) - Fraction(value)))
        assert abs(Fraction(rounded) - Fraction(value)) == nearest
    special = torch.tensor([math.inf, -math.inf, math.nan, 1e300, -0.0, -1e-300]).double()
    assert same_bits(
        round_once(special, dtype)[[0, 1, 3, 4, 5]], special[[0, 1, 3, 4, 5]].to(dtype)
    )
    assert round_once(special, dtype)[2].isnan()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"model_toml": TOML.replace(b"vocab_size = 9", b"vocab_size = 10")},
            "one and .*two are of two models, .*:\n  model.vocab_size: 9 -> 10$",
        ),
        ({"tensors": {"w": torch.zeros(3)}}, r"tensor weights/w: \[2\] -> \[3\]$"),
        (
            {"tensors": {"v": torch.zeros(2)}},
            r"w: \[2\] -> nothing\n.*v: nothing -> \[2\]$",
        ),
        ({"files": {"tokenizer.json": b"[]"}}, "one tokenizer, .*: tokenizer.json differs"),
        ({"files": {}}, "one tokenizer, .*: tokenizer.json is in one of them only"),
        (
            {"both": {"w": torch.zeros(2, dtype=torch.int64)}},
            "w is torch.int64, which has no average",
        ),
    ],
)
def test_what_has_no_average(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    options: dict[str, Any] = {"files": {"tokenizer.json": b"{}"}}
    other = dict(other)
    tensors = other.pop("both", {"w": torch.zeros(2)})
    one = save(tmp_path / "one", tensors, **options)
    two = save(tmp_path / "two", other.pop("tensors", tensors), **{**options, **other})
    with pytest.raises(CheckpointError, match=re.compile(said, re.DOTALL)):
        average([one, two], tmp_path / "mean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_damage_leaves_nothing_and_names_the_file(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, {"w": torch.zeros(2)}) for name in ("one", "two")]
    (shard,) = paths[1].glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=f"{shard} is damaged"):
        average(paths, tmp_path / "mean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_directories_of_runs_are_asked_for_what_is_meant(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match="is not the directory of a run that has checkpoints"):
        newest_checkpoints(tmp_path / "run", 2)
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, [], state={}, files={})
    with pytest.raises(CheckpointError, match=r"run/checkpoints holds 1 checkpoint, not 2\.$"):
        newest_checkpoints(tmp_path / "run", 2)
    with pytest.raises(CheckpointError, match=r"run is the directory of a run\. Name checkpoints"):
        average([tmp_path / "run"], tmp_path / "mean")
    (tmp_path / "mean").mkdir()
    with pytest.raises(CheckpointError, match="mean exists already"):
        average([], tmp_path / "mean")
