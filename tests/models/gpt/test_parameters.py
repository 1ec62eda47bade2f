"""The parameter table: names, splits, starts, and what a rank holds."""

import math
from pathlib import Path

import pytest

from megapipe.config import load_config
from megapipe.layout.layout import Layout, Stage
from megapipe.layout.parameters import FIRST, LAST, ParameterShard, ParameterSpec, shard_of
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.parameters import (
    gpt_parameter_count,
    local_sizes,
    parameter_table,
)
from megapipe.models.gpt.presets import PRESETS
from megapipe.parameter_role import Role
from tests.config.examples import preset_text, write
from tests.layouts import layout_of


def model(preset: str, **changes: object) -> GPTConfig:
    return GPTConfig.model_validate({**PRESETS[preset], **changes})


def shard(spec: ParameterSpec, tensor: int, rank: int = 0) -> ParameterShard:
    return shard_of(spec, tensor_rank=rank, tensor_size=tensor, sequence_parallel=False)


def split_dim(spec: ParameterSpec) -> int | None:
    return None if spec.split is None else spec.split.dim


def test_names_of_a_llama_in_model_order() -> None:
    names = [spec.name for spec in parameter_table(model("llama-micro", num_layers=1))]
    assert names == [
        "embedding.weight",
        "layers.0.attention_norm.weight",
        "layers.0.attention.q.weight",
        "layers.0.attention.k.weight",
        "layers.0.attention.v.weight",
        "layers.0.attention.output.weight",
        "layers.0.mlp_norm.weight",
        "layers.0.mlp.gate.weight",
        "layers.0.mlp.up.weight",
        "layers.0.mlp.down.weight",
        "final_norm.weight",
        "output.weight",
    ]


def test_gpt2_has_biases_positions_and_one_embedding() -> None:
    table = {spec.name: spec for spec in parameter_table(model("gpt2-micro", num_layers=1))}
    assert "output.weight" not in table
    assert "layers.0.mlp.gate.weight" not in table
    assert table["position_embedding.weight"].shape == (128, 64)
    assert split_dim(table["layers.0.attention.q.bias"]) == 0
    assert split_dim(table["layers.0.attention.output.bias"]) is None
    assert split_dim(table["layers.0.mlp.down.bias"]) is None
    assert table["final_norm.bias"].init.kind == "zeros"


def test_qwen3_norms_heads_and_qwen2_has_biases_on_qkv_only() -> None:
    table = {spec.name: spec for spec in parameter_table(model("qwen3-micro"))}
    assert table["layers.3.attention.k_norm.weight"].shape == (16,)
    biases = [spec.name for spec in parameter_table(model("qwen2-micro")) if "bias" in spec.name]
    assert len(biases) == 3 * 4
    assert "layers.0.attention.k.bias" in biases


def expected_role(name: str) -> Role:
    if name in ("embedding.weight", "position_embedding.weight"):
        return Role.EMBEDDING
    if name == "output.weight":
        return Role.OUTPUT
    if "norm" in name:
        return Role.NORM
    return Role.BIAS if name.endswith(".bias") else Role.MATRIX


def expected_places(name: str, *, tied: bool) -> tuple[int | str, ...]:
    if name.startswith("layers."):
        return (int(name.split(".")[1]),)
    if name == "embedding.weight" and tied:
        return (FIRST, LAST)
    return (FIRST,) if "embedding" in name else (LAST,)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("-micro")])
def test_role_place_and_start_of_every_parameter(preset: str) -> None:
    shape = model(preset, init_std=0.5)
    table = parameter_table(shape)
    assert len({spec.name for spec in table}) == len(table)
    for spec in table:
        assert spec.role == expected_role(spec.name), spec
        assert (spec.role in (Role.NORM, Role.BIAS)) == (len(spec.shape) == 1), spec
        assert spec.places == expected_places(spec.name, tied=shape.tie_embeddings)
        if spec.name.endswith((".attention.output.weight", ".mlp.down.weight")):
            assert split_dim(spec) == 1
            assert spec.init.std == 0.5 / math.sqrt(8)
        elif len(spec.shape) == 2:
            assert spec.init.std == 0.5
            assert split_dim(spec) == (None if "position" in spec.name else 0)
        else:
            assert spec.init.kind == ("zeros" if spec.name.endswith("bias") else "ones")


def test_vocabulary_is_padded_to_a_multiple_of_64_on_each_rank() -> None:
    embedding = parameter_table(model("gpt2"))[0]
    rows = [shard(embedding, tensor).rows for tensor in (1, 2, 8)]
    assert rows == [50304, 25152, 6336]
    shape = model("gpt2", num_heads=8)
    assert [local_sizes(shape, tensor).vocabulary for tensor in (1, 2, 8)] == rows
    assert local_sizes(model("llama3-8b"), 1).vocabulary == 128256
    assert local_sizes(model("gpt2", num_heads=8, vocab_size=1), 8).vocabulary == 64


def test_key_and_value_heads_are_copied_where_ranks_outnumber_them() -> None:
    shape = model("llama-micro")  # 8 heads, 2 of them key/value, head_dim 8
    table = {spec.name: spec for spec in parameter_table(shape)}
    key, query = table["layers.0.attention.k.weight"], table["layers.0.attention.q.weight"]
    assert [local_sizes(shape, tensor).kv_heads for tensor in (1, 2, 4, 8)] == [2, 1, 1, 1]
    assert [shard(key, tensor).shape[0] for tensor in (1, 2, 4, 8)] == [16, 8, 8, 8]
    assert [shard(query, tensor).shape[0] for tensor in (1, 2, 4, 8)] == [64, 32, 16, 8]
    down = table["layers.0.mlp.down.weight"]
    assert shard(down, 4).shape == (64, 40)


def layout(folder: Path, pipeline: int) -> Layout:
    words = [f"--parallel.pipeline={pipeline}", "--parallel.tensor=1"]
    return layout_of(load_config(write(folder, preset_text("gpt2-micro")), words, FAMILIES))


def names(layout: Layout, stage: Stage) -> list[str]:
    return [spec.name for spec in layout.stage_parameters(stage)]


def test_a_tied_embedding_is_held_twice_when_the_ends_are_on_different_stages(
    tmp_path: Path,
) -> None:
    one, two = layout(tmp_path, 1), layout(tmp_path, 2)
    whole = names(one, one.stages[0])
    assert sorted(whole) == sorted(spec.name for spec in parameter_table(model("gpt2-micro")))
    first, last = (names(two, stage) for stage in two.stages)
    assert sorted([*first, *last]) == sorted([*whole, "embedding.weight"])
    assert "embedding.weight" in first
    assert "embedding.weight" in last


@pytest.mark.parametrize("preset", ["llama-micro", "qwen2-micro", "gpt2-micro"])
def test_ranks_hold_the_whole_model_and_the_copies_that_are_known(preset: str) -> None:
    shape = model(preset, vocab_size=512)
    tensor = 4
    table = parameter_table(shape)
    held = sum(shard(spec, tensor, rank).local_size for rank in range(tensor) for spec in table)
    copies = sum(3 * spec.size for spec in table if spec.split is None)
    if shape.num_kv_heads == 2:  # each key/value head is on two ranks
        copies += sum(spec.size for spec in table if ".k." in spec.name or ".v." in spec.name)
    assert held == gpt_parameter_count(shape) + copies


def test_a_trillion_parameters_are_counted_quickly() -> None:
    assert gpt_parameter_count(model("megatron-1t")) == 1_008_038_758_400
