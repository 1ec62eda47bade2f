"""The small config that is checked keeps every feature and the layout of the user's."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from megapipe.config import Config, ModelConfig, load_config
from megapipe.config.axes import AXES, AxisKind, Splits
from megapipe.equivalence.shrink import MAX_RANKS, SEQUENCE, shrink, shrink_axes
from megapipe.layout.axes import Axes
from megapipe.layout.parameters import ParameterSpec, Split, padded_rows
from megapipe.layout.world import resolve_axes
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import NARROW_HEAD
from megapipe.models.gpt.family import GPTFamily

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
    small, changes = shrink(config, FAMILIES["gpt"])
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
    return shrink(load_config(path, list(overrides), FAMILIES), FAMILIES["gpt"])[0]


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
        parallel = shrink(config, FAMILIES["gpt"])[0].parallel
        return parallel.activation_limit, parallel.stage_costs

    assert small("--parallel.activation_limit=6", "--parallel.stage_costs=x") == (3.0, None)
    assert small("--parallel.activation_limit=1") == (1.0, None)
    assert small("--parallel.activation_limit=1 GiB") == (None, None)


# --- The vocabulary ------------------------------------------------------------------------------


class OtherPadding(GPTFamily):
    """A GPT whose vocabulary is padded to another multiple."""

    def parameters(self, model: ModelConfig) -> list[ParameterSpec]:
        padded = Split(0, pad_to=96)
        return [
            replace(spec, split=padded) if spec.split and spec.split.pad_to else spec
            for spec in super().parameters(model)
        ]


@pytest.mark.parametrize(
    ("family", "multiple"), [(GPTFamily(), 64), (OtherPadding(), 96)], ids=["gpt", "other"]
)
@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_rows_of_padding_stay_and_none_come_in(
    family: GPTFamily, multiple: int, tensor: int
) -> None:
    def padding(vocabulary: int) -> bool:
        words = [f"--model.vocab_size={vocabulary}", "--model.num_heads=8", "--parallel.data=1"]
        words += [f"--parallel.tensor={tensor}", "--model.num_kv_heads=8"]
        config = load_config(SHAPES / "llama_shape.toml", words, FAMILIES)
        small, _ = shrink(config, family)
        size = small.parallel.tensor
        assert size == tensor
        return padded_rows(small.model.vocab_size, size, multiple) * size > small.model.vocab_size

    assert padding(8 * 96 * 64 + 1)
    assert padding(8 * 96 * 64 - 1)
    assert not padding(8 * 96 * 64)
    if multiple == 96:
        assert padding(64 * 64 * tensor), "64 is the multiple of another family"


# --- Axes ----------------------------------------------------------------------------------------


def with_sites(splits: Splits, **sizes: int) -> Axes:
    """The axes of a layout, with one more in front."""
    return Axes(sizes, (AxisKind("sites", splits), *AXES))


@pytest.mark.parametrize("splits", Splits)
def test_a_fourth_axis_is_given_up_where_two_ranks_on_each_are_too_many(splits: Splits) -> None:
    for size in (2, 3, 16):
        small, given_up = shrink_axes(with_sites(splits, sites=size, pipeline=2, data=2, tensor=2))
        assert small.world_size == MAX_RANKS
        assert sorted(small.sizes.values()) == [1, 2, 2, 2]
        (gone,) = [name for name in small.names if small.sizes[name] == 1]
        assert given_up == [
            f"parallel.{gone} is not checked: 2 ranks on each axis of the layout are 16 in all, "
            "more than 8"
        ]
    kept = with_sites(splits, sites=2, pipeline=2, data=1, tensor=2)
    assert shrink_axes(kept) == (kept, [])


@pytest.mark.parametrize(
    ("sizes", "small"),
    [
        ({"pipeline": 3, "data": 3, "tensor": 3}, {"pipeline": 2, "data": 2, "tensor": 2}),
        ({"pipeline": 64, "tensor": 8}, {"pipeline": 2, "tensor": 4}),
    ],
)
def test_axes_stay_parallel_where_two_ranks_on_each_are_not_too_many(
    sizes: dict[str, int], small: dict[str, int]
) -> None:
    assert shrink_axes(Axes.of(**sizes)) == (Axes.of(**small), [])
