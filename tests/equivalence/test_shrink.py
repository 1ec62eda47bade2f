"""The small config that is checked keeps every feature and the layout of the user's."""

import itertools
from pathlib import Path

import pytest

from megapipe.config import Config, load_config
from megapipe.equivalence.shrink import MAX_RANKS, SEQUENCE, shrink
from megapipe.layout.world import resolve_axes
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import NARROW_HEAD

SHAPES = Path(__file__).parents[1] / "configs"
CONFIGS = sorted((Path(__file__).parents[2] / "launch" / "configs").glob("*.toml"))
SWITCHES = (
    "norm",
    "activation",
    "position",
    "tie_embeddings",
    "bias",
    "qkv_bias",
    "qk_norm",
    "dropout",
    "attention_dropout",
    "rope_scaling",
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_launch_configs_shrink_to_a_laptop(path: Path) -> None:
    config = load_config(path, [], FAMILIES)
    small, changes = shrink(config)
    assert small.train.precision == "fp64"
    axes = resolve_axes(small)
    assert 1 <= axes.world_size <= MAX_RANKS
    for axis, old in resolve_axes(config).sizes.items():
        assert (axes.sizes[axis] > 1) >= (old > 1), f"{axis} stays parallel"
        assert axes.sizes[axis] <= max(old, 2)
    for switch in SWITCHES:
        assert getattr(small.model, switch) == getattr(config.model, switch)
    for key in ("schedule", "sequence_parallel"):
        assert getattr(small.parallel, key) == getattr(config.parallel, key)
    assert (small.model.sliding_window is None) == (config.model.sliding_window is None)
    assert (small.model.num_kv_heads < small.model.num_heads) == (
        config.model.num_kv_heads < config.model.num_heads
    )
    assert (small.parallel.virtual > 1) == (config.parallel.virtual > 1)
    assert small.model.head_dim <= NARROW_HEAD
    assert small.train.sequence_length <= SEQUENCE
    assert any(change.startswith("model.hidden_size") for change in changes)


def shrunk(*overrides: str) -> Config:
    path = Path(__file__).parents[1] / "configs" / "llama_shape.toml"
    return shrink(load_config(path, list(overrides), FAMILIES))[0]


def test_what_does_not_divide_still_does_not() -> None:
    assert shrunk("--parallel.pipeline=4").model.num_layers % 4 != 0
    assert shrunk("--parallel.pipeline=2").model.num_layers % 2 == 0
    assert shrunk("--model.vocab_size=50257").model.vocab_size % 2 == 1
    given = shrunk("--parallel.pipeline=3", "--parallel.layers_per_stage=[1, 4, 1]")
    assert given.parallel.layers_per_stage == (1, 2, 1)


def test_key_value_heads_on_several_ranks_stay_so() -> None:
    small = shrunk("--parallel.tensor=4").model
    assert small.num_kv_heads == 2


def test_a_sliding_window_shorter_than_the_sequence_stays_shorter() -> None:
    small = shrunk("--model.sliding_window=5")
    assert small.model.sliding_window is not None
    assert small.model.sliding_window < small.train.sequence_length


@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual", "data"),
    [*itertools.product([1, 4, 8], [1, 2, 16], [1], [1, 64]), (8, 8, 12, 2), (1, 2, 8, 1)],
)
def test_any_layout_shrinks_to_a_valid_one(
    tensor: int, pipeline: int, virtual: int, data: int
) -> None:
    """Config's own checks run on the result."""
    schedule = "interleaved-1f1b" if virtual > 1 else "1f1b"
    small = shrunk(
        "--model.preset=llama3-70b",
        "--model.num_layers=96",
        "--model.num_heads=64",
        "--model.num_kv_heads=8",
        "--model.hidden_size=8192",
        "--model.head_dim=128",
        "--model.ffn_hidden_size=28672",
        f"--parallel.tensor={tensor}",
        f"--parallel.pipeline={pipeline}",
        f"--parallel.virtual={virtual}",
        f"--parallel.schedule={schedule}",
        f"--parallel.data={data}",
        "--data.streams=64",
        "--train.global_batch_size=256",
    )
    assert resolve_axes(small).world_size <= MAX_RANKS


def test_a_small_layout_keeps_the_share_of_the_limit() -> None:
    """Of 16 ranks 8 are left, so half the microbatches; memory and times are not those of the
    small model."""
    words = [
        "--parallel.schedule=auto",
        "--parallel.pipeline=16",
        "--model.num_layers=16",
        "--parallel.data=1",
    ]

    def small(*more: str) -> tuple[object, object]:
        config = load_config(SHAPES / "gpt2_shape.toml", [*words, *more], FAMILIES)
        parallel = shrink(config)[0].parallel
        return parallel.activation_limit, parallel.stage_costs

    assert small("--parallel.activation_limit=6", "--parallel.stage_costs=x") == (3.0, None)
    assert small("--parallel.activation_limit=1") == (1.0, None)
    assert small("--parallel.activation_limit=1 GiB") == (None, None)
