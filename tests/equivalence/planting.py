"""Bugs planted in a layout, for checks that have to find them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from torch import nn

from megapipe.distributed.mesh import Mesh
from megapipe.kernel_choice import KernelChoice
from megapipe.layout.layout import Layout
from megapipe.stage import build_stages
from megapipe.tensor_parallel.source_losses import SourceLosses
from megapipe.train import engine

Stages = Mapping[int, nn.Module]
Plant = Callable[[Stages], None]


@contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """Engines that are built in this block have stages changed by `plant`, unless their mesh is
    that of one process."""

    def build(
        layout: Layout, mesh: Mesh, choice: KernelChoice, losses: SourceLosses | None
    ) -> Stages:
        stages = build_stages(layout, mesh, choice, losses)
        if mesh.world_size > 1:
            plant(stages)
        return stages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "build_stages", build)
        yield
