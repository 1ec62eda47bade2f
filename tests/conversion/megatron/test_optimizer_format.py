"""Formats of optimizer state are named as Megatron names them."""

import io
from pathlib import Path

import pytest
import torch

from megapipe.conversion.megatron.archive import whole_file
from megapipe.conversion.megatron.assembly import GlobalTensor
from megapipe.conversion.megatron.optimizer_format import (
    optimizer_format,
    optimizer_groups,
    optimizer_state,
    optimizer_steps,
)
from megapipe.conversion.megatron.torch_dist import DistributedContents

MOMENT = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
BUCKET = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.exp_avg"
SHAPELESS = GlobalTensor((), "float32", ())


@pytest.mark.parametrize(
    ("names", "common", "expected"),
    [
        (["decoder.final_layernorm.weight"], {}, None),
        ([MOMENT], {}, "a tensor for each parameter, without the distributed optimizer"),
        (
            [MOMENT],
            {"optimizer": {"param_state_sharding_type": "fully_reshardable"}},
            "fully_reshardable",
        ),
        (
            ["chained_0.optimizer.state.exp_avg.x"],
            {"optimizer": {0: {"param_state_sharding_type": "fully_sharded_model_space"}, 1: {}}},
            "fully_sharded_model_space",
        ),
        (
            [BUCKET],
            {"content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"}},
            "dp_reshardable",
        ),
        ([BUCKET], {}, "an unnamed format of the distributed optimizer"),
    ],
)
def test_it_is_found(names: list[str], common: dict[object, object], expected: str | None) -> None:
    found = DistributedContents(dict.fromkeys(names, SHAPELESS), common, {})
    assert optimizer_format(found) == expected


def test_it_may_be_an_object_of_each_group(tmp_path: Path) -> None:
    name = "optimizer.distributed.dp_group_idx_0.param_state_sharding_type/shard_0_1"
    content = io.BytesIO()
    torch.save(["dp_zero_gather_scatter"], content)
    (tmp_path / "file").write_bytes(content.getvalue())
    found = DistributedContents({}, {}, {name: whole_file(tmp_path / "file")})
    assert optimizer_format(found) == "dp_zero_gather_scatter"


def test_state_is_read_where_it_has_the_weights_shapes() -> None:
    weights = {name: GlobalTensor(shape, "bfloat16", ()) for name, shape in SHAPES.items()}
    moments = {
        f"optimizer.state.{kind}.{name}": GlobalTensor(shape, "float32", ())
        for kind in ("exp_avg", "param")
        for name, shape in SHAPES.items()
    }
    found = DistributedContents(weights | moments, {}, {})
    state = optimizer_state(found, weights)
    assert {kind: list(tensors) for kind, tensors in state.items()} == {
        "exp_avg": list(SHAPES),
        "param": list(SHAPES),
    }
    flat = moments | {"optimizer.state.exp_avg.a.weight": GlobalTensor((6,), "float32", ())}
    assert optimizer_state(DistributedContents(weights | flat, {}, {}), weights) == {}


@pytest.mark.parametrize(
    "optimizer",
    [
        5,
        {"param_groups": 3, "state": []},
        {0: None, 1: {"optimizer": [1]}},
        {"param_groups": [None, {"step": "7"}]},
        {"param_groups": [{"step": True}], "state": {"common_step": True}},
        {"param_groups": [{"step": float("inf")}]},
        {"param_groups": [{"step": float("nan")}]},
        {"param_groups": [{"step": 1.5}]},
        {"param_groups": [{"step": -1}]},
        {"param_groups": [{"step": 3}], "state": {"common_step": 4}},
    ],
)
def test_steps_that_are_not_said_or_no_number(optimizer: object) -> None:
    found = DistributedContents({}, {"optimizer": optimizer}, {})
    assert optimizer_steps(found) is None
    assert len(optimizer_groups(found)) <= 1


def test_of_very_many_groups_the_first_are_read() -> None:
    found = DistributedContents({}, {"optimizer": {"param_groups": [{"eps": 1.0}] * 10**5}}, {})
    assert optimizer_groups(found) == [{"eps": 1.0}] * 100


SHAPES = {"a.weight": (2, 3), "decoder.layers.0.b.bias": (4,)}
