"""The parameter table: names, splits, starts, and what a rank holds."""

import math

import pytest

from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.parameters import (
    local_kv_heads,
    local_parameter_count,
    local_shape,
    padded_vocab_size,
    parameter_count,
    parameter_table,
    stage_table,
)
from megapipe.models.gpt.presets import PRESETS
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.vocabulary import vocabulary_rows


def model(preset: str, **changes: object) -> GPTConfig:
    return GPTConfig.model_validate({**PRESETS[preset], **changes})


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
    assert table["layers.0.attention.q.bias"].tensor_dim == 0
    assert table["layers.0.attention.output.bias"].tensor_dim is None
    assert table["layers.0.mlp.down.bias"].tensor_dim is None
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


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("-micro")])
def test_role_and_start_of_every_parameter(preset: str) -> None:
    shape = model(preset, init_std=0.5)
    table = parameter_table(shape)
    assert len({spec.name for spec in table}) == len(table)
    for spec in table:
        assert spec.role == expected_role(spec.name), spec
        assert (spec.role in (Role.NORM, Role.BIAS)) == (len(spec.shape) == 1), spec
        assert (spec.layer is not None) == spec.name.startswith("layers.")
        if spec.name.endswith((".attention.output.weight", ".mlp.down.weight")):
            assert spec.tensor_dim == 1
            assert spec.init.std == 0.5 / math.sqrt(8)
        elif len(spec.shape) == 2:
            assert spec.init.std == 0.5
            assert spec.tensor_dim == (None if "position" in spec.name else 0)
        else:
            assert spec.init.kind == ("zeros" if spec.name.endswith("bias") else "ones")


def test_vocabulary_is_padded_to_a_multiple_of_64_on_each_rank() -> None:
    assert [vocabulary_rows(50257, tensor) for tensor in (1, 2, 8)] == [50304, 25152, 6336]
    assert padded_vocab_size(50257, 8) == 50688
    assert padded_vocab_size(128256, 1) == 128256
    assert padded_vocab_size(1, 8) == 512


def test_key_and_value_heads_are_copied_where_ranks_outnumber_them() -> None:
    shape = model("llama-micro")  # 8 heads, 2 of them key/value, head_dim 8
    table = {spec.name: spec for spec in parameter_table(shape)}
    key, query = table["layers.0.attention.k.weight"], table["layers.0.attention.q.weight"]
    assert [local_kv_heads(shape, tensor) for tensor in (1, 2, 4, 8)] == [2, 1, 1, 1]
    assert [local_shape(key, shape, tensor)[0] for tensor in (1, 2, 4, 8)] == [16, 8, 8, 8]
    assert [local_shape(query, shape, tensor)[0] for tensor in (1, 2, 4, 8)] == [64, 32, 16, 8]
    down = table["layers.0.mlp.down.weight"]
    assert local_shape(down, shape, 4) == (64, 40)


def test_a_tied_embedding_is_held_twice_when_the_ends_are_on_different_stages() -> None:
    shape = model("gpt2-micro")
    whole = [spec.name for spec in stage_table(shape, range(4), first=True, last=True)]
    assert sorted(whole) == sorted(spec.name for spec in parameter_table(shape))
    first = stage_table(shape, range(2), first=True, last=False)
    last = stage_table(shape, range(2, 4), first=False, last=True)
    names = [spec.name for spec in [*first, *last]]
    assert sorted(names) == sorted([*whole, "embedding.weight"])
    assert last[-1].name == "embedding.weight"


@pytest.mark.parametrize("preset", ["llama-micro", "qwen2-micro", "gpt2-micro"])
def test_ranks_hold_the_whole_model_and_the_copies_that_are_known(preset: str) -> None:
    shape = model(preset, vocab_size=512)
    tensor = 4
    held = tensor * local_parameter_count(shape, range(4), tensor=tensor, first=True, last=True)
    table = parameter_table(shape)
    copies = sum(3 * spec.size for spec in table if spec.tensor_dim is None)
    if shape.num_kv_heads == 2:  # each key/value head is on two ranks
        copies += sum(spec.size for spec in table if ".k." in spec.name or ".v." in spec.name)
    assert held == parameter_count(shape) + copies


def test_a_trillion_parameters_are_counted_quickly() -> None:
    assert parameter_count(model("megatron-1t")) == 1_008_038_758_400
