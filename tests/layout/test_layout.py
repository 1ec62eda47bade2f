"""The layout as one object: stages and where they lie, samples, tensors between stages, and shards
of all ranks together."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megapipe.config import Config, ModelConfig, load_config
from megapipe.errors import ConfigError, ScheduleError
from megapipe.layout.axes import Axes
from megapipe.layout.family import PlaceCosts
from megapipe.layout.layout import Layout, microbatches, resolve
from megapipe.layout.parameters import (
    FIRST,
    LAST,
    Init,
    ParameterShard,
    ParameterSpec,
    Place,
    ReductionGroup,
    Split,
)
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.family import GPTFamily
from megapipe.parameter_role import Role
from megapipe.pipeline.schedule import lower
from tests.config.examples import write
from tests.layouts import layout_of

ROOT = Path(__file__).parents[2]
INTERLEAVED = ("--parallel.schedule=interleaved-1f1b", "--parallel.virtual=2")
ZB_V = ("--parallel.schedule=zb-v", "--parallel.virtual=2")
SEQUENCE = "--parallel.sequence_parallel=true"
TIED = "--model.tie_embeddings=true"


def load(folder: Path, *words: str) -> Config:
    """8 layers of width 64 with 8 heads (4 of keys and values) and 500 tokens; 16 sequences of 64
    tokens in microbatches of 2; 2 tensor and 2 pipeline ranks."""
    return load_config(write(folder), words, FAMILIES)


def layout(folder: Path, *words: str, world_size: int | None = None) -> Layout:
    return layout_of(load(folder, *words), world_size)


# --- Stages --------------------------------------------------------------------------------------


def test_stages_have_the_layers_in_order(tmp_path: Path) -> None:
    first, last = layout(tmp_path).stages
    assert (first.number, first.rank, first.layers) == (0, 0, range(4))
    assert (last.number, last.rank, last.layers) == (1, 1, range(4, 8))
    assert (first.first, first.last, last.first, last.last) == (True, False, False, True)
    assert first.places == (FIRST, 0, 1, 2, 3)
    assert last.places == (4, 5, 6, 7, LAST)
    (alone,) = layout(tmp_path, "--parallel.pipeline=1").stages
    assert alone.places == (FIRST, *range(8), LAST)


def test_layers_per_stage_are_kept(tmp_path: Path) -> None:
    stages = layout(tmp_path, *INTERLEAVED, "--parallel.layers_per_stage=[1,2,3,2]").stages
    assert [(stage.rank, stage.layers) for stage in stages] == [
        (0, range(1)),
        (1, range(1, 3)),
        (0, range(3, 6)),
        (1, range(6, 8)),
    ]
    first, last = layout(tmp_path, "--parallel.layers_per_stage=[2,6]").stages
    assert (first.layers, last.layers) == (range(2), range(2, 8))


def test_the_output_layer_weighs_in_the_balance(tmp_path: Path) -> None:
    heavy = layout(tmp_path, "--model.vocab_size=100000")
    assert [len(stage.layers) for stage in heavy.stages] == [7, 1]


class CostlyLayer(GPTFamily):
    """A GPT whose third layer costs as much as five others."""

    def costs(self, config: Config, axes: Axes, place: Place) -> PlaceCosts:
        costs = super().costs(config, axes, place)
        return replace(costs, balance=5 * costs.balance) if place == 2 else costs


def test_layers_may_cost_differently(tmp_path: Path) -> None:
    config = load(tmp_path, "--parallel.pipeline=4", "--parallel.data=1")
    plain = resolve(config, None, FAMILIES["gpt"])
    costly = resolve(config, None, CostlyLayer())
    assert [len(stage.layers) for stage in plain.stages] == [2, 2, 2, 2]
    assert [len(stage.layers) for stage in costly.stages] == [2, 1, 3, 2]
    assert costly.costs[2].balance == 5 * costly.costs[1].balance


@pytest.mark.parametrize(
    ("words", "placement"),
    [
        ((), [0, 1]),
        (INTERLEAVED, [0, 1, 0, 1]),
        (ZB_V, [0, 1, 1, 0]),
        ((*ZB_V, "--parallel.pipeline=4"), [0, 1, 2, 3, 3, 2, 1, 0]),
    ],
)
def test_stages_lie_where_the_schedule_puts_them(
    tmp_path: Path, words: tuple[str, ...], placement: list[int]
) -> None:
    found = layout(tmp_path, *words)
    assert found.placement == [stage.rank for stage in found.stages] == placement
    assert found.virtual == found.config.parallel.virtual
    assert found.lowered == lower(found.program.compute)
    assert found.lowered is found.lowered, "proved once"


# --- Numbers -------------------------------------------------------------------------------------


def test_samples_and_microbatches_are_those_of_one_replica(tmp_path: Path) -> None:
    for world_size, replicas in ((4, 1), (8, 2), (32, 8)):
        found = layout(tmp_path, world_size=world_size)
        assert found.replicas == found.config.parallel.data == replicas
        assert found.samples == 16 // replicas
        assert found.microbatches == microbatches(found.config, found.axes) == 8 // replicas
        assert [len(actions) for actions in found.program.compute] == [16 // replicas] * 2


def test_the_tensor_between_stages_by_hand(tmp_path: Path) -> None:
    found = layout(tmp_path, "--train.precision=bf16")
    assert found.hidden_shape == (64, 2, 64)
    assert found.boundary_bytes == 64 * 2 * 64 * 2
    split = layout(tmp_path, "--train.precision=fp64", SEQUENCE)
    assert split.hidden_shape == (32, 2, 64)
    assert split.boundary_bytes == 32 * 2 * 64 * 8


def test_sequence_parallelism_needs_tensor_ranks(tmp_path: Path) -> None:
    assert layout(tmp_path, SEQUENCE).sequence_parallel
    assert not layout(tmp_path).sequence_parallel
    alone = layout(tmp_path, SEQUENCE, "--parallel.tensor=1")
    assert not alone.sequence_parallel
    assert alone.hidden_shape == (64, 2, 64)
    assert alone.reduction_groups() == []


def test_the_config_of_a_layout_names_every_size(tmp_path: Path) -> None:
    config, family = load(tmp_path), FAMILIES["gpt"]
    assert config.parallel.data is None
    axes = Axes.of(pipeline=2, data=2, tensor=2)
    found = resolve(config, axes, family)
    assert found.axes == axes
    assert found.config.parallel.data == 2
    assert found == resolve(config, 8, family) == resolve(found.config, None, family)


def test_what_can_not_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="World sizes that work with this config: 4, 8, 16, 32"):
        layout(tmp_path, world_size=6)
    with pytest.raises(ScheduleError, match='"1f1b" has activations of 2 microbatches live'):
        layout(tmp_path, "--parallel.activation_limit=1")


# --- Parameters ----------------------------------------------------------------------------------


def test_a_stage_has_the_parameters_of_its_places(tmp_path: Path) -> None:
    found = layout(tmp_path)
    first, last = found.stages
    for stage in (first, last):
        for spec in found.stage_parameters(stage):
            assert set(spec.places) & set(stage.places)
    names = [[spec.name for spec in found.stage_parameters(stage)] for stage in (first, last)]
    assert [*names[0], *names[1]] == list(found.parameters)
    assert (names[0][0], names[1][-1]) == ("embedding.weight", "output.weight")


def test_a_tied_embedding_has_two_holders_where_its_ends_are_on_two_ranks(tmp_path: Path) -> None:
    for words, holders in (((), (0, 1)), (ZB_V, (0,)), (INTERLEAVED, (0, 1))):
        found = layout(tmp_path, TIED, *words)
        assert found.holders(found.parameters["embedding.weight"]) == holders
        assert found.holders(found.parameters["final_norm.weight"]) == (found.placement[-1],)
    alone = layout(tmp_path, TIED, "--parallel.pipeline=1")
    names = [spec.name for spec in alone.stage_parameters(alone.stages[0])]
    assert names.count("embedding.weight") == 1


def test_a_rank_has_no_shards_of_a_stage_that_it_does_not_hold(tmp_path: Path) -> None:
    found = layout(tmp_path)
    with pytest.raises(AssertionError):
        found.shards(found.stages[0], rank=2)


def test_reduction_groups_by_hand(tmp_path: Path) -> None:
    tensor, ends = (("tensor", (0, 1)),), (("pipeline", (0, 1)),)
    assert layout(tmp_path).reduction_groups() == []
    assert layout(tmp_path, SEQUENCE).reduction_groups() == [tensor]
    assert layout(tmp_path, TIED).reduction_groups() == [ends]
    assert layout(tmp_path, TIED, SEQUENCE).reduction_groups() == [ends, tensor]
    copies = layout(tmp_path, "--parallel.tensor=8").reduction_groups()
    assert copies == [(("tensor", (rank, rank + 1)),) for rank in (0, 2, 4, 6)]


class SharedNorm(GPTFamily):
    """A GPT that applies one more norm at both of its ends; all others are used in one place."""

    def parameters(self, model: ModelConfig) -> list[ParameterSpec]:
        ends = ParameterSpec("shared", (64,), (FIRST, LAST), Init("ones"), Role.NORM)
        once = ParameterSpec("once", (64,), (FIRST,), Init("ones"), Role.NORM)
        return [ends, *super().parameters(model), once]


def test_parameters_that_are_split_alike_may_be_used_in_other_places(tmp_path: Path) -> None:
    found = resolve(load(tmp_path), None, SharedNorm())
    ends = (("pipeline", (0, 1)),)
    assert found.reduction_groups() == [ends]
    assert {
        held.shard.reduction_group for held in held_by_all(found) if held.shard.name == "shared"
    } == {ends}


class Mixer(GPTFamily):
    """A GPT with matrices that tensor ranks split by rows."""

    rows: tuple[int, ...] = ()

    def parameters(self, model: ModelConfig) -> list[ParameterSpec]:
        mixers = [
            ParameterSpec(f"mixer{n}", (n, 1), (0,), Init("ones"), Role.MATRIX, Split(0))
            for n in self.rows
        ]
        return [*mixers, *super().parameters(model)]


def test_parameters_of_other_lengths_are_shared_in_another_way(tmp_path: Path) -> None:
    """A single row is on both tensor ranks, 8 rows are half on each."""
    family = Mixer()
    family.rows = (1, 8)
    found = resolve(load(tmp_path), None, family)
    tensor = (("tensor", (0, 1)),)
    assert found.shards(found.stages[0], rank=0)["mixer1"].reduction_group == tensor
    assert found.reduction_groups() == [tensor]


def test_what_tensor_ranks_can_not_share_is_refused(tmp_path: Path) -> None:
    family = Mixer()
    family.rows = (12, 251)
    with pytest.raises(ConfigError) as caught:
        resolve(load(tmp_path), None, family)
    assert str(caught.value) == (
        "parallel.tensor = 2 does not fit mixer251, whose dimension 0 has 251 elements; use 1."
    )
    family.rows = (12,)
    resolve(load(tmp_path), None, family)
    with pytest.raises(
        ConfigError, match=r"mixer12, whose dimension 0 has 12 elements; use 1, 2 or 4"
    ):
        resolve(load(tmp_path, "--parallel.tensor=8"), None, family)


class UnequalHeads(GPTFamily):
    """A GPT with a matrix that can't be what its table says."""

    def parameters(self, model: ModelConfig) -> list[ParameterSpec]:
        split = Split(1, units=5)
        wrong = ParameterSpec("wrong", (2, 12), (0,), Init("ones"), Role.MATRIX, split)
        return [wrong, *super().parameters(model)]


def test_a_table_that_no_rank_can_follow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="wrong, whose dimension 1 has 12 elements, which are not 5 equal units; no size fits",
    ):
        resolve(load(tmp_path, "--parallel.tensor=1"), None, UnequalHeads())


CASES = {
    "one process": ("--parallel.tensor=1", "--parallel.pipeline=1"),
    "tensor ranks": ("--parallel.tensor=4", "--parallel.pipeline=1"),
    "sequence parallelism": ("--parallel.tensor=4", SEQUENCE),
    "copies of key and value heads": ("--parallel.tensor=8", "--model.num_kv_heads=2"),
    "norms of heads": ("--model.qk_norm=true", SEQUENCE, "--parallel.tensor=8"),
    "a tied embedding": (TIED, "--parallel.pipeline=4", SEQUENCE),
    "tied, on one rank": (TIED, *ZB_V),
    "tied, in a loop": (TIED, *INTERLEAVED),
    "a rank of padding alone": ("--model.vocab_size=65", "--parallel.tensor=4", TIED),
    "biases and positions": (
        *("--model.position=learned", "--model.norm=layernorm", "--model.activation=gelu"),
        *("--model.bias=true", "--model.qkv_bias=true", SEQUENCE),
    ),
    "replicas": ("--parallel.data=2",),
}


@dataclass(frozen=True)
class Held:
    """A shard with the rank that holds it."""

    rank: int
    shard: ParameterShard


def held_by_all(found: Layout) -> Iterator[Held]:
    """All shards of all ranks; a parameter that two stages of a rank share comes once."""
    for rank in range(found.axes.world_size):
        own: dict[str, ParameterShard] = {}
        for stage in found.stages:
            if stage.rank == found.axes.coordinates(rank)["pipeline"]:
                for name, shard in found.shards(stage, rank).items():
                    assert own.setdefault(name, shard) == shard
        yield from (Held(rank, shard) for shard in own.values())


@pytest.mark.parametrize("case", CASES)
def test_owners_cover_each_parameter_once_in_each_replica(tmp_path: Path, case: str) -> None:
    found = layout(tmp_path, *CASES[case])
    seen = {
        (replica, name): torch.zeros(spec.shape, dtype=torch.int8)
        for replica in range(found.replicas)
        for name, spec in found.parameters.items()
    }
    for held in held_by_all(found):
        shard = held.shard
        if shard.owner:
            where = tuple(
                slice(start, start + length)
                for start, length in zip(shard.start, shard.shape, strict=True)
            )
            seen[found.axes.coordinates(held.rank)["data"], shard.name][where] += 1
    assert all(count.min() == count.max() == 1 for count in seen.values())


@pytest.mark.parametrize("case", CASES)
def test_reduction_groups_are_those_of_all_shards(tmp_path: Path, case: str) -> None:
    """And all ranks of a group hold the same rectangle."""
    found = layout(tmp_path, *CASES[case])
    of_shards: dict[tuple[str, ReductionGroup, tuple[int, ...]], list[Held]] = {}
    for held in held_by_all(found):
        if (group := held.shard.reduction_group) is not None:
            (members,) = [m for m in found.axes.subgroups(dict(group)) if held.rank in m]
            of_shards.setdefault((held.shard.name, group, members), []).append(held)
    assert sorted({group for _, group, _ in of_shards}) == found.reduction_groups()
    for (_, _, members), all_held in of_shards.items():
        assert tuple(held.rank for held in all_held) == members
        assert len({(held.shard.start, held.shard.shape) for held in all_held}) == 1


# --- A trillion parameters -----------------------------------------------------------------------

PROGRAM = """
import sys
from megapipe.config import load_config
from megapipe.layout.layout import resolve
from megapipe.models.families import FAMILIES

path, ranks = sys.argv[1], int(sys.argv[2])
config = load_config(path, ["--data.streams=96"], FAMILIES)
layout = resolve(config, ranks, FAMILIES["gpt"])
program = sum(map(len, layout.lowered))
own = [stage for stage in layout.stages if stage.rank == 63]
rank = layout.axes.rank({"pipeline": 63, "data": layout.replicas - 1, "tensor": 7})
held = sum(shard.local_size for stage in own for shard in layout.shards(stage, rank).values())
heavy = sorted({"torch", "numpy"} & set(sys.modules))
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(layout.stages), layout.microbatches, program > 0, rank, held, peak, *heavy)
"""


class Resolved(NamedTuple):
    """What a Python of its own has found."""

    stages: int
    microbatches: int
    rank: int
    held: int
    peak_kib: int
    heavy: list[str]


def resolved(ranks: int) -> Resolved:
    """The peak is that of the program's own memory: what `getrusage` says of a process includes the
    memory of the one that started it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "launch/configs/megatron-1t.toml"), str(ranks)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    stages, microbatches, _, rank, held, peak, *heavy = done.stdout.split()
    return Resolved(int(stages), int(microbatches), int(rank), int(held), int(peak), heavy)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("ranks", "count"), [(3072, 512), (16384, 96)])
def test_a_trillion_parameters_without_torch_in_little_memory(ranks: int, count: int) -> None:
    found = resolved(ranks)
    assert found.heavy == []
    assert (found.stages, found.microbatches, found.rank) == (128, count, ranks - 1)
    width = 25600
    matrices, split_biases = 12 * width**2 // 8, 7 * width // 8  # query, key, value and up
    whole = 6 * width  # two norms with biases; biases of the products that end in the residual
    ends = 51200 * width // 8 + 2 * width  # of the model: embedding or output layer, last norm
    assert found.held == 2 * (matrices + split_biases + whole) + ends
    assert found.peak_kib < 200 * 1000**2 / 1024
