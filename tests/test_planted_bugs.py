"""The proof fails where it must: bugs that other stacks have shipped, planted one at a time.

Each is planted in the layout alone, and the proof has to name a tensor that it spoils.
"""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from megapipe.config import Config
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.equivalence.check import Difference, Verdict, prove, synthetic_tokens
from megapipe.layout.axes import Axes
from megapipe.layout.program import microbatches
from megapipe.microbatch import MicroBatch
from megapipe.models.build import build_stages
from megapipe.tensor_parallel.parameter import sharded_parameters
from megapipe.train.engine import BuildStages, Engine
from tests.ranks import run_ranks
from tests.test_layouts import TOLERANCE, Layout

Stages = Mapping[int, nn.Module]


def _forget_to_sum(stages: Stages, name: str) -> None:
    """The gradient of a global tensor stays partial on each rank that holds it."""
    for stage in stages.values():
        for parameter in sharded_parameters(stage):
            if any(piece.name == name and piece.sum_over for piece in parameter.shards):
                parameter.retarget(sum_over=None, counted=parameter.shards[0].owner)


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


Plant = Callable[[Stages], None]


def _prove_with_bug(config: Config, plant: Plant | None) -> Difference | None:
    def build(config: Config, mesh: Mesh) -> Stages:
        stages = build_stages(config, mesh)
        if plant is not None and mesh.world_size > 1:
            plant(stages)
        return stages

    parallel = config.parallel
    assert parallel.data is not None
    mesh = build_mesh(
        Axes.of(pipeline=parallel.pipeline, data=parallel.data, tensor=parallel.tensor),
        torch.device("cpu"),
    )
    verdict: Verdict | None = prove(config, mesh, build, synthetic_tokens(config), 2)
    return verdict.first_beyond(TOLERANCE) if verdict else None


@pytest.mark.parametrize(
    ("plant", "kind", "name"),
    [
        (norm_not_reduced, "gradient", "layers.2.mlp_norm.weight"),
        (tied_gradient_not_summed, "gradient", "embedding.weight"),
        (microbatches_scaled_wrongly, "gradient", "position_embedding.weight"),
    ],
)
def test_a_planted_bug_is_found_and_named(plant: Plant, kind: str, name: str) -> None:
    layout = Layout(tensor=2, pipeline=2, sequence_parallel=True)
    config = layout.config("gpt2")
    assert run_ranks(_prove_with_bug, 4, config, None)[0] is None
    first = run_ranks(_prove_with_bug, 4, config, plant)[0]
    assert first is not None
    assert (first.step, first.kind, first.name) == (0, kind, name)


def _scaled_gradients(config: Config) -> Difference | None:
    """All gradients of the layout are too large by one factor, which clipping would hide."""
    build = Engine.__init__

    def wrong(self: Engine, config: Config, mesh: Mesh, build_stages: BuildStages) -> None:
        build(self, config, mesh, build_stages)
        factor = microbatches(config) if mesh.world_size > 1 else 1
        step = self.optimizer.step
        patch.setattr(
            self.optimizer, "step", lambda rate, gradient_scale: step(rate, gradient_scale * factor)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", wrong)
        return _prove_with_bug(config, None)


def test_gradients_all_too_large_by_one_factor_are_found() -> None:
    """Adam's updates would be the same: only the comparison of gradients shows it."""
    first = run_ranks(_scaled_gradients, 2, Layout(data=2).config("llama"))[0]
    assert first is not None
    assert (first.step, first.kind) == (0, "gradient")
