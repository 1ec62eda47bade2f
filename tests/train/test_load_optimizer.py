"""Runs that go on with the optimizer of a Megatron checkpoint: value by value, and step by step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapipe.config import Config
from megapipe.distributed.rank_group import ALONE
from megapipe.errors import CheckpointError
from megapipe.models.families import FAMILIES
from megapipe.train.engine import Engine
from megapipe.train.load_from import LoadFrom
from tests.conversion.megatron import samples
from tests.conversion.megatron.samples import FFN, HIDDEN, Weights, llama_weights
from tests.layouts import engine_of, mesh_of
from tests.ranks import run_ranks
from tests.train.loading import make_config

VOCABULARY, STEPS = 13, 7
"""Tokens without the padding of samples.VOCABULARY, and steps that Megatron has taken."""
BOTH = '--checkpoint.load_state=["weights", "optimizer"]'
GROUP = {"betas": (0.9, 0.999), "eps": 1e-6, "decoupled_weight_decay": True}
GROUPS = [
    GROUP | {"weight_decay": 0.01, "wd_mult": 1.0},
    GROUP | {"weight_decay": 0.0, "wd_mult": 0.0},
]
LAYER = "decoder.layers.{}."
STEP = torch.tensor(float(STEPS))
PLAIN = {"state": {"common_step": STEP}, "param_groups": GROUPS}
DISTRIBUTED = {
    "optimizer": {"param_groups": [group | {"step": STEPS} for group in GROUPS]},
    "param_state_sharding_type": "fully_reshardable",
}
SEEDS = {"exp_avg": 1, "exp_avg_sq": 2, "param": 3}


def moments(kind: str) -> Weights:
    """What Megatron keeps of each weight, under its names."""
    found = llama_weights(SEEDS[kind])
    return {name: one.square() for name, one in found.items()} if kind == "exp_avg_sq" else found


def save(
    folder: Path, optimizer: object, kinds: tuple[str, ...] = (*SEEDS,), **others: Any
) -> Path:
    """A checkpoint of Megatron's whose weights are rounded, and what its optimizer keeps."""
    state = {
        f"optimizer.state.{kind}.{name}": one
        for kind in kinds
        for name, one in moments(kind).items()
    }
    rounded = {name: one.bfloat16() for name, one in moments("param").items()}
    given = {**samples.LLAMA, "vocab_size": VOCABULARY, **others}
    folder.mkdir()
    return samples.save_distributed(
        folder / "iter_0000010", rounded | state, 2, optimizer=optimizer, **given
    )


def mapped(theirs: Weights) -> Weights:
    """The same under our names, put together by hand."""
    ours = {
        "embedding.weight": theirs["embedding.word_embeddings.weight"][:VOCABULARY],
        "final_norm.weight": theirs["decoder.final_layernorm.weight"],
        "output.weight": theirs["output_layer.weight"][:VOCABULARY],
    }
    for layer in range(4):
        there, here = LAYER.format(layer), f"layers.{layer}."
        by_head = theirs[there + "self_attention.linear_qkv.weight"].view(2, 3, HIDDEN // 2, HIDDEN)
        q, k, v = (one.reshape(HIDDEN, HIDDEN) for one in by_head.unbind(1))
        gate, up = theirs[there + "mlp.linear_fc1.weight"].split(FFN)
        ours |= {
            here + "attention_norm.weight": theirs[
                there + "self_attention.linear_qkv.layer_norm_weight"
            ],
            here + "attention.q.weight": q,
            here + "attention.k.weight": k,
            here + "attention.v.weight": v,
            here + "attention.output.weight": theirs[there + "self_attention.linear_proj.weight"],
            here + "mlp_norm.weight": theirs[there + "mlp.linear_fc1.layer_norm_weight"],
            here + "mlp.gate.weight": gate,
            here + "mlp.up.weight": up,
            here + "mlp.down.weight": theirs[there + "mlp.linear_fc2.weight"],
        }
    return ours


def loaded(config: Config) -> tuple[Engine, list[str]]:
    mesh, lines = mesh_of(config), list[str]()
    loads = LoadFrom(config, FAMILIES, mesh.world.rank_group)
    engine = engine_of(config, mesh)
    loads.restore(engine, lines.append)
    return engine, lines


def differing(config: Config) -> list[str]:
    """The names of shards of this rank that aren't what Megatron's are by `mapped`."""
    engine, _ = loaded(config)
    assert engine.optimizer.steps == STEPS
    expected = {
        "weights": mapped(moments("param")),
        **{kind: mapped(moments(kind)) for kind in ("exp_avg", "exp_avg_sq")},
    }
    wrong, seen = [], set()
    for kind, shard, values in engine.optimizer.state():
        seen.add(kind)
        slices = tuple(slice(a, a + n) for a, n in zip(shard.start, shard.shape, strict=True))
        if not torch.equal(values, expected[kind][shard.name][slices]):
            wrong.append(f"{kind}/{shard.name}")
    return wrong if seen == expected.keys() else [f"only {seen}"]


OF_KERNELS = {"param_groups": [group | {"step": STEP.int().view(1)} for group in GROUPS]}


@pytest.mark.parametrize(
    "optimizer", [PLAIN, OF_KERNELS, DISTRIBUTED, {0: DISTRIBUTED, 1: DISTRIBUTED}]
)
def test_moments_and_master_weights(tmp_path: Path, optimizer: object) -> None:
    run = save(tmp_path / "megatron", optimizer)
    assert differing(make_config(tmp_path, run, "--parallel.data=1", BOTH)) == []


def test_each_rank_takes_its_part(tmp_path: Path) -> None:
    run = save(tmp_path / "megatron", DISTRIBUTED)
    words = ("--parallel.data=1", "--parallel.tensor=2", "--parallel.pipeline=2", BOTH)
    assert run_ranks(differing, 4, make_config(tmp_path, run, *words)) == [[]] * 4


def test_weights_without_master_weights_are_as_stored(tmp_path: Path) -> None:
    run = save(tmp_path / "megatron", PLAIN, ("exp_avg", "exp_avg_sq"))
    engine, _ = loaded(make_config(tmp_path, run, "--parallel.data=1", BOTH))
    expected = mapped(moments("param"))
    for kind, shard, values in engine.optimizer.state():
        if kind == "weights":
            assert torch.equal(values, expected[shard.name].bfloat16().float()), shard.name


def test_steps_go_on_as_those_of_torch(tmp_path: Path) -> None:
    """With gradients of one source, against torch's AdamW that holds the same state."""
    run = save(tmp_path / "megatron", DISTRIBUTED)
    settings = ("--optimizer.betas=[0.9, 0.999]", "--optimizer.epsilon=1e-6")
    words = ("--parallel.data=1", BOTH, "--optimizer.weight_decay=0.01", *settings)
    engine, lines = loaded(make_config(tmp_path, run, *words))
    assert not lines
    reference = {name: one.clone() for name, one in mapped(moments("param")).items()}
    adamw = torch_adamw(reference)
    views = {
        shard.name: view
        for buffer in engine.buffers
        for shard, view in buffer.shards(buffer.gradients)
    }
    for step in range(3):
        for number, name in enumerate(sorted(reference)):
            generator = torch.Generator().manual_seed(100 * step + number)
            gradient = torch.randn(reference[name].shape, generator=generator)
            reference[name].grad = gradient
            views[name].copy_(gradient)
        adamw.step()
        engine.optimizer.step(1e-2)
    for kind, shard, values in engine.optimizer.state():
        if kind == "weights":
            torch.testing.assert_close(values, reference[shard.name], rtol=1e-6, atol=1e-6)


def torch_adamw(weights: Mapping[str, Tensor]) -> torch.optim.AdamW:
    """As it is behind Megatron's checkpoint."""
    normed = [one for name, one in weights.items() if "norm" in name]
    others = [one for name, one in weights.items() if "norm" not in name]
    groups = [{"params": others}, {"params": normed, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    first, second = (mapped(moments(kind)) for kind in ("exp_avg", "exp_avg_sq"))
    for name, one in weights.items():
        adamw.state[one] = {"step": STEP.clone(), "exp_avg": first[name].clone()}
        adamw.state[one]["exp_avg_sq"] = second[name].clone()
    return adamw


def test_other_settings_are_listed(tmp_path: Path) -> None:
    run = save(tmp_path / "megatron", PLAIN)
    _, (line,) = loaded(make_config(tmp_path, run, "--parallel.data=1", BOTH))
    assert line.splitlines() == [
        "Its optimizer had other settings (there -> here):",
        "  optimizer.betas: [0.9, 0.999] -> [0.9, 0.95]",
        "  optimizer.epsilon: 1e-06 -> 1e-08",
        "  optimizer.weight_decay: 0.01 -> 0.1",
    ]


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "kinds", "said"),
    [
        (None, (), "it holds none"),
        ({"param_groups": GROUPS}, ("exp_avg", "exp_avg_sq"), "doesn't say how many steps"),
        (PLAIN, ("exp_avg", "param"), "it keeps exp_avg of each parameter, and AdamW exp_avg and"),
        (
            PLAIN | {"param_groups": [GROUPS[0] | {"decoupled_weight_decay": False}]},
            ("exp_avg", "exp_avg_sq"),
            "adds the weight decay to the gradients",
        ),
        (
            {**PLAIN, "param_groups": [{"step": STEPS + 1}]},
            ("exp_avg", "exp_avg_sq"),
            "doesn't say how many steps",
        ),
    ],
)
def test_what_is_no_state_of_adamw(
    tmp_path: Path, optimizer: object, kinds: tuple[str, ...], said: str
) -> None:
    run = save(tmp_path / "megatron", optimizer, kinds)
    with pytest.raises(CheckpointError) as caught:
        LoadFrom(make_config(tmp_path, run, BOTH), FAMILIES, ALONE)
    assert f"{run}: the optimizer's state can't be taken from it: " in str(caught.value)
    assert said in str(caught.value)
    assert 'leave "optimizer" out of checkpoint.load_state' in str(caught.value)


def test_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    run = samples.save_distributed(
        tmp_path / "iter_0000010",
        {**llama_weights(), "optimizer.distributed.dp_group_idx_0.exp_avg": torch.zeros(6)},
        optimizer={"param_state_sharding_type": "dp_reshardable"},
        **samples.LLAMA,
    )
    with pytest.raises(CheckpointError) as caught:
        LoadFrom(make_config(tmp_path, run, BOTH), FAMILIES, ALONE)
    assert 'its format is "dp_reshardable"' in str(caught.value)
    assert "--dist-ckpt-optim-fully-reshardable" in str(caught.value)


def test_steps_and_data_are_not_taken(tmp_path: Path) -> None:
    run = save(tmp_path / "megatron", PLAIN)
    words = '--checkpoint.load_state=["weights", "optimizer", "step"]'
    with pytest.raises(CheckpointError) as caught:
        LoadFrom(make_config(tmp_path, run, words), FAMILIES, ALONE)
    assert str(caught.value).endswith(
        "is a Megatron checkpoint, which gives a run weights and optimizer. Set "
        'checkpoint.load_state = ["weights", "optimizer"].'
    )


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    run = save(tmp_path / "megatron", PLAIN)
    config = make_config(tmp_path, run, "--parallel.data=1", BOTH, "--optimizer.name=sgd")
    with pytest.raises(CheckpointError, match="which kept exp_avg and exp_avg_sq of each"):
        loaded(config)
