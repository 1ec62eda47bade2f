"""The equivalence check fails where it must: bugs that other stacks have shipped, one at a time.

Each is planted in the layout alone, and the check has to name a tensor that it spoils.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from megapipe.config import Config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.distributed.mesh import Mesh
from megapipe.equivalence.check import Difference, Verdict, check_equivalence
from megapipe.layout.layout import Layout
from megapipe.microbatch import MicroBatch
from megapipe.tensor_parallel.parameter import sharded_parameters
from megapipe.train.engine import Engine
from tests.equivalence.planting import Plant, Stages, planted
from tests.layouts import layout_of, mesh_of
from tests.ranks import run_ranks
from tests.test_layouts import TOLERANCE, LayoutCase


def _forget_to_sum(stages: Stages, name: str) -> None:
    """The gradient of a global tensor stays partial on each rank that holds it."""
    for stage in stages.values():
        for parameter in sharded_parameters(stage):
            if any(shard.name == name and shard.reduction_group for shard in parameter.shards):
                parameter.shards = tuple(replace(s, reduction_group=None) for s in parameter.shards)


def norm_not_reduced(stages: Stages) -> None:
    """Under sequence parallelism each rank keeps the gradient of its part of the sequence."""
    _forget_to_sum(stages, "layers.2.mlp_norm.weight")


def tied_gradient_not_summed(stages: Stages) -> None:
    """First and last stage each update their copy of the embedding by their own share."""
    _forget_to_sum(stages, "embedding.weight")


def microbatches_scaled_wrongly(stages: Stages) -> None:
    """The loss is right, but the gradient of every microbatch but the first counts half."""

    def halve(stage: nn.Module, inputs: tuple[object, MicroBatch], output: torch.Tensor):
        first = int(inputs[1].samples_B[0]) % 16 == 0
        return output if first or stage.head is None else output / 2 + output.detach() / 2

    for stage in stages.values():
        stage.register_forward_hook(halve)


def sources_numbered_from_one(stages: Stages) -> None:
    """The loss is right, but its parts are those of other sources."""

    def shift(stage: nn.Module, inputs: tuple[object, MicroBatch]) -> tuple[object, MicroBatch]:
        x, batch = inputs
        assert batch.sources_BS is not None
        return x, replace(batch, sources_BS=(batch.sources_BS + 1) % 3)

    for stage in stages.values():
        stage.register_forward_pre_hook(shift)


def _check(config: Config) -> Difference | None:
    """The first difference, on rank 0."""
    tokens = synthetic_tokens(config)
    verdict: Verdict | None = check_equivalence(layout_of(config), mesh_of(config), tokens, 2)
    return verdict.first_beyond(TOLERANCE) if verdict else None


def _check_with_bug(config: Config, plant: Plant | None) -> Difference | None:
    with planted(plant) if plant else nullcontext():
        return _check(config)


@pytest.mark.parametrize(
    ("plant", "kind", "name"),
    [
        (norm_not_reduced, "gradient", "layers.2.mlp_norm.weight"),
        (tied_gradient_not_summed, "gradient", "embedding.weight"),
        (microbatches_scaled_wrongly, "gradient", "position_embedding.weight"),
        (sources_numbered_from_one, "source loss", "loss of text"),
    ],
)
def test_a_planted_bug_is_found_and_named(plant: Plant, kind: str, name: str) -> None:
    config = LayoutCase(tensor=2, pipeline=2, sequence_parallel=True).config("gpt2")
    assert run_ranks(_check_with_bug, 4, config, None)[0] is None
    first = run_ranks(_check_with_bug, 4, config, plant)[0]
    assert first is not None
    assert (first.step, first.kind, first.name) == (0, kind, name)


def _scaled_gradients(config: Config) -> Difference | None:
    """All gradients of the layout are too large by one factor, which clipping would hide."""
    build = Engine.__init__

    def wrong(self: Engine, layout: Layout, mesh: Mesh) -> None:
        build(self, layout, mesh)
        factor = layout.microbatches if mesh.world_size > 1 else 1
        step = self.optimizer.step
        patch.setattr(
            self.optimizer, "step", lambda rate, gradient_scale: step(rate, gradient_scale * factor)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", wrong)
        return _check(config)


def test_gradients_all_too_large_by_one_factor_are_found() -> None:
    """Adam's updates would be the same: only the comparison of gradients shows it."""
    first = run_ranks(_scaled_gradients, 2, LayoutCase(data=2).config("llama"))[0]
    assert first is not None
    assert (first.step, first.kind) == (0, "gradient")
