"""Layouts, meshes and engines of a config, as tests want them: on CPUs, of the family it names."""

import torch
from torch import nn

from megapipe.config import Config
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.kernel_choice import choose_kernels
from megapipe.layout.layout import Layout, resolve
from megapipe.models.families import FAMILIES
from megapipe.stage import build_stages
from megapipe.train.engine import Engine

CPU = torch.device("cpu")


def layout_of(config: Config, world_size: int | None = None) -> Layout:
    """The config's layout on as many processes, by default as few as it needs."""
    return resolve(config, world_size, FAMILIES[config.model.family])


def mesh_of(config: Config) -> Mesh:
    """The mesh of the config's layout. Collective over the default process group's ranks."""
    return build_mesh(layout_of(config).axes, CPU)


def stages_of(layout: Layout) -> dict[int, nn.Module]:
    """The stages of a layout of one process."""
    return build_stages(layout, Mesh.single(CPU), choose_kernels(layout.config, CPU))


def engine_of(config: Config, mesh: Mesh | None = None) -> Engine:
    """The engine of the config's layout on a mesh, by default its own. Collective."""
    return Engine(layout_of(config), mesh or mesh_of(config))
