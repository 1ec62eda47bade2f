"""Costs and activations by arithmetic, against FLOPs elsewhere and against what is measured."""

from pathlib import Path

import pytest
import torch

from megapipe.config import Config, load_config
from megapipe.mesh import Mesh
from megapipe.models.build import build_stages
from megapipe.models.estimate import estimated_activation_bytes, estimated_costs
from megapipe.models.flops import embedding_flops_per_token, flops_per_token
from megapipe.models.presets import PRESETS
from megapipe.pipeline.measure import activation_bytes
from megapipe.pipeline.program import hidden_shape
from megapipe.pipeline.schedule import Action, Kind
from megapipe.train.proof import synthetic_microbatch

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[1] / "configs"


def load(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", ["--parallel.data=1", *overrides], PRESETS)


@pytest.mark.parametrize("name", ["gpt2_shape", "llama_shape"])
def test_costs_add_up_to_the_flops_of_the_model(name: str) -> None:
    config = load(name, "--parallel.pipeline=2")
    costs, train = estimated_costs(config), config.train
    total = sum(costs.of(Action(s, k, 0)) for s in (0, 1) for k in (Kind.FORWARD, Kind.BACKWARD))
    tokens = train.micro_batch_size * train.sequence_length
    expected = flops_per_token(config.model, train.sequence_length)
    assert total == pytest.approx(tokens * (expected + embedding_flops_per_token(config.model)))
    again = estimated_costs(load(name, "--parallel.pipeline=2", "--train.recompute=full"))
    layers = again.of(Action(0, Kind.BACKWARD, 0)) - costs.of(Action(0, Kind.BACKWARD, 0))
    assert layers == pytest.approx(costs.of(Action(0, Kind.FORWARD, 0)), rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", ["gpt2_shape", "llama_shape"])
def test_activations_are_about_what_is_measured(name: str, recompute: str, precision: str) -> None:
    """On one rank, a sequence long enough for the small tensors not to matter."""
    config = load(
        name,
        f"--train.recompute={recompute}",
        f"--train.precision={precision}",
        "--model.dropout=0",
        "--model.attention_dropout=0",
    )
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[precision]
    batch = synthetic_microbatch(config, range(config.train.micro_batch_size), CPU)
    stages = build_stages(config, Mesh.single(CPU))
    found = activation_bytes(stages, batch, torch.empty(hidden_shape(config), dtype=dtype))
    assert estimated_activation_bytes(config)[0] == pytest.approx(found[0], rel=0.1)
