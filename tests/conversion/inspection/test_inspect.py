"""Reports on checkpoints, runs and Hugging Face directories, and on how two differ."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from megapipe.conversion.inspection.inspect import report_one, report_two
from megapipe.conversion.inspection.report import Report
from megapipe.errors import CheckpointError, UsageError
from megapipe.models.families import FAMILIES
from tests.checkpoint.samples import edit_manifest, save_sample, save_sample_weights
from tests.conversion.megatron.samples import save_ranks, weights
from tests.conversion.models import save_model
from tests.data.tokenizer_samples import byte_level


def bar(what: str, total: int) -> Any:
    return nullcontext(lambda count: None)


def lines(report: Report) -> set[str]:
    console = Console(highlight=False, soft_wrap=True, width=200)
    with console.capture() as capture:
        console.print(*report.parts, sep="\n")
    return {" ".join(line.strip("│ ").split()) for line in capture.get().splitlines()}


def inspect(path: Path, **options: bool) -> Report:
    given = {"read": True, "tensors": False, "stats": False, **options}
    return report_one(path, FAMILIES, **given, bar=bar)


def test_statistics_of_a_checkpoint(tmp_path: Path) -> None:
    values = torch.tensor([[3.0, math.nan], [-4.0, math.inf]])
    path = save_sample_weights(tmp_path / "w", {"a": values, "b": torch.zeros(2)})
    report = inspect(path, stats=True)
    assert report.status == 0, "what is not finite is no damage"
    said = lines(report)
    assert "values 1 NaN and 1 infinite in 1 tensor" in said
    assert "whole yes, every byte verified" in said
    assert "weights/a │ float32 │ [2, 2] │ 1 │ 5 │ 4 │ -0.5 │ 2" in said
    content = json.loads(report.json())
    assert (content["kind"], content["step"], content["problems"]) == ("checkpoint", None, [])
    assert content["not_finite"] == ["weights/a"]
    assert content["tensors"][1] == {
        "name": "weights/b",
        "dtype": "float32",
        "shape": [2],
        "chunks": 1,
        "norm": 0.0,
        "largest": 0.0,
        "mean": 0.0,
        "nan": 0,
        "infinite": 0,
    }
    assert "values all finite" in lines(
        inspect(save_sample_weights(tmp_path / "e", {}), stats=True)
    )


def test_a_run_and_its_damage_as_json(tmp_path: Path) -> None:
    newest = save_sample(tmp_path / "checkpoints", 2)
    save_sample(tmp_path / "checkpoints", 1)
    (newest / "config.toml").unlink()
    report = inspect(tmp_path)
    assert report.status == 1
    content = json.loads(report.json())
    assert [(one["step"], one["tokens"]) for one in content["checkpoints"]] == [
        (2, 2000),
        (1, 1000),
    ]
    assert "config.toml is missing" in content["checkpoints"][0]["problems"][0]
    with pytest.raises(
        UsageError, match=f"--stats is for single checkpoints, .* Name one, such as {newest}"
    ):
        inspect(tmp_path, stats=True)
    with pytest.raises(UsageError, match=r"--diff is for single checkpoints, and .*/checkp"):
        report_two(newest, tmp_path, FAMILIES, bar)


def test_statistics_stop_at_damage(tmp_path: Path) -> None:
    path = save_sample_weights(tmp_path / "w", {"a": torch.zeros(3)})
    (shard,) = path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    report = inspect(path, stats=True)
    assert report.status == 1
    assert any("is damaged: bytes" in line for line in lines(report))
    with pytest.raises(CheckpointError, match="is damaged: bytes"):
        inspect(path, stats=True, read=False)


def test_tensors_are_listed_in_order(tmp_path: Path) -> None:
    names = ["layers.10.w", "layers.9.w", "output.w", "embedding.w"]
    path = save_sample_weights(tmp_path / "w", dict.fromkeys(names, torch.zeros(1)))
    listed = json.loads(inspect(path, tensors=True).json())["tensors"]
    assert [one["name"] for one in listed] == [f"weights/{names[at]}" for at in (3, 1, 0, 2)]


def test_two_checkpoints_that_differ(tmp_path: Path) -> None:
    one = save_sample_weights(tmp_path / "A", {"w": torch.zeros(4), "same": torch.ones(2)})
    two = save_sample_weights(
        tmp_path / "B", {"w": torch.tensor([0.0, 1.0, 0.0, 0.5]), "same": torch.ones(2)}
    )
    three = save_sample_weights(tmp_path / "C", {"x": torch.zeros(4), "w": torch.zeros(2, 2)})
    report = report_two(one, two, FAMILIES, bar)
    assert report.status == 1
    said = lines(report)
    assert "weights/w │ [4] │ float32 │ 2 of 4 │ 1 │ 1" in said
    assert "1 tensor the same, 1 not: 2 values in all, by up to 1 (relative 1)" in said
    content = json.loads(report.json())
    assert (content["differs"], content["differing_values"], content["largest"]) == (True, 2, 1.0)
    assert content["same"] == ["weights/same"]
    said = lines(report_two(one, three, FAMILIES, bar))
    assert {"1 tensor only in A:", "weights/same", "1 tensor only in B:", "weights/x"} <= said
    assert "weights/w │ [4] / [2, 2] │ float32 │ - │ - │ -" in said
    report = report_two(one, one, FAMILIES, bar)
    assert report.status == 0
    assert "2 tensors the same, 0 not" in lines(report)


def test_a_hugging_face_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    report = inspect(tmp_path, stats=True)
    said = lines(report)
    assert {"architecture LlamaForCausalLM", "tensors 1 float32", "values all finite"} <= said
    assert "whole sizes agree, the format has no checksums" in said
    assert "model.norm.weight │ float32 │ [4] │ 1 │ 2 │ 1 │ 1 │ 0" in said
    assert json.loads(report.json())["kind"] == "hugging_face"
    assert report_two(tmp_path, tmp_path, FAMILIES, bar).status == 0


def test_the_model_and_the_tokenizer_of_another_stack(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path / "llama")
    report = inspect(path)
    model = "model family gpt, num_layers 4, hidden_size 64, vocab_size 259, max_sequence_length "
    said = lines(report)
    assert {
        "architecture LlamaForCausalLM",
        f"{model}128",
        "tokenizer none: neither a tokenizer.json nor a .model file",
    } <= said
    assert json.loads(report.json())["model"]["num_heads"] == 4
    byte_level(size=259).save(str(path / "tokenizer.json"))
    assert "tokenizer tokenizer.json, 259 tokens" in lines(inspect(path))
    (path / "tokenizer.json").write_text("{")
    config = json.loads((path / "config.json").read_text()) | {"hidden_act": "relu"}
    (path / "config.json").write_text(json.dumps(config))
    said = lines(inspect(path))
    assert any(line.startswith("tokenizer can't be used: ") for line in said)
    assert any(line.startswith("model can't be used: ") and "hidden_act" in line for line in said)


def test_what_an_average_is_of(tmp_path: Path) -> None:
    path = save_sample_weights(tmp_path / "w", {"a": torch.zeros(1)})
    merged: list[object] = [{"path": "/runs/a", "share": 2 / 3}, {"path": "/b", "share": 1 / 3}]
    edit_manifest(path, lambda document: document.update(state={"merged": merged}))
    assert {"average of /runs/a (66.7%)", "/b (33.3%)"} <= lines(inspect(path))
    hostile = [7, *merged * 9]
    edit_manifest(path, lambda document: document.update(state={"merged": hostile}))
    assert {"average of None", "and 3 more"} <= lines(inspect(path))


def test_two_layouts_of_a_megatron_checkpoint(tmp_path: Path) -> None:
    whole = weights(layers=2)
    one = save_ranks(tmp_path / "one", whole)
    two = save_ranks(tmp_path / "two", whole, tensor=2, pipeline=2)
    report = inspect(two, stats=True)
    assert {"stack Megatron", "format torch", "step 10", "values all finite"} <= lines(report)
    content = json.loads(report.json())
    assert content["kind"] == "megatron"
    assert {tensor["name"] for tensor in content["tensors"]} == whole.keys()
    assert report_two(one, two, FAMILIES, bar).status == 0
