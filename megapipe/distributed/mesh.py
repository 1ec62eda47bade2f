"""The mesh: which rank stands where on the pipeline, data and tensor axes.

A mesh is built once and passed down; nothing here is global, and two meshes can live in one
process. An axis of size one exists like any other and its collectives cost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megapipe.distributed.rank_group import RankGroup
from megapipe.distributed.shared_memory.collectives import (
    SharedMemoryCollectives,
    connect_collectives,
)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""For one operation: the ranks of a large model may wait for a slow disk together."""


@dataclass(frozen=True)
class Axis:
    """One rank's view of a set of ranks that communicate.

    `rank` is the index within `ranks` (global ranks, in axis order); `group` is None exactly when
    the axis has one rank, so a collective over it is the identity. `shared` are collectives that
    replace the group's where ranks compute on the CPUs of one machine: the tensor axis' alone,
    since layers wait for them all the time.
    """

    name: str
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    group: dist.ProcessGroup | None = None
    shared: SharedMemoryCollectives | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def rank_group(self) -> RankGroup:
        """Its ranks, for values and errors between them."""
        return RankGroup.of(self.group)


@dataclass(frozen=True)
class Mesh:
    """Where one rank stands. Ranks count tensor first, then data, then pipeline.

    `replica` holds the ranks that share a data index: together they own one copy of the model and
    read one share of each batch. `world` holds all ranks.
    """

    device: torch.device
    pipeline: Axis
    data: Axis
    tensor: Axis
    replica: Axis
    world: Axis
    device_mesh: DeviceMesh | None = None
    split_groups: list[dist.ProcessGroup] = field(default_factory=list, compare=False, repr=False)
    """This rank's groups that `split` has made."""

    @staticmethod
    def single(device: torch.device) -> "Mesh":
        """The mesh of one process: every axis has size one and no process group is needed."""
        return Mesh(
            device,
            pipeline=Axis("pipeline"),
            data=Axis("data"),
            tensor=Axis("tensor"),
            replica=Axis("replica"),
            world=Axis("world"),
        )

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Each process group of this rank once."""
        axes = (self.pipeline, self.data, self.tensor, self.replica, self.world)
        own = [axis.group for axis in axes if axis.group is not None]
        return list(dict.fromkeys([*own, *self.split_groups]))

    def split(self, name: str, groups: Sequence[Sequence[int]]) -> Axis:
        """As `split_world`; the caller's group is one of the mesh's from then on."""
        axis = split_world(name, groups)
        if axis.group is not None:
            self.split_groups.append(axis.group)
        return axis

    def global_rank(self, pipeline: int, data: int, tensor: int) -> int:
        return (pipeline * self.data.size + data) * self.tensor.size + tensor

    def describe(self) -> str:
        return (
            f"rank {self.rank} (pipeline {self.pipeline.rank}, data {self.data.rank}, "
            f"tensor {self.tensor.rank})"
        )


def build_mesh(*, pipeline: int, data: int, tensor: int, device: torch.device) -> Mesh:
    """Arrange the default process group's ranks as pipeline x data x tensor.

    Collective: every rank of the world calls it. With a product of one no process group is needed.
    """
    sizes = (pipeline, data, tensor)
    world_size = pipeline * data * tensor
    if world_size == 1:
        return Mesh.single(device)
    assert dist.get_world_size() == world_size, (dist.get_world_size(), sizes)
    device_mesh = init_device_mesh(
        device.type, sizes, mesh_dim_names=("pipeline", "data", "tensor")
    )

    def axis(name: str) -> Axis:
        part = device_mesh[name]
        ranks = tuple(part.mesh.tolist())
        group = part.get_group() if len(ranks) > 1 else None
        if group is not None:  # init_device_mesh takes no timeout and has its backend's, 10 minutes
            set_group_timeout(group, COLLECTIVE_TIMEOUT)
        return Axis(name, ranks, part.get_local_rank(), group)

    replicas = [
        [(p * data + d) * tensor + t for p, t in product(range(pipeline), range(tensor))]
        for d in range(data)
    ]
    return Mesh(
        device=device,
        pipeline=axis("pipeline"),
        data=axis("data"),
        tensor=_share_memory(axis("tensor"), device),
        replica=split_world("replica", replicas),
        world=Axis("world", tuple(range(world_size)), dist.get_rank(), dist.group.WORLD),
        device_mesh=device_mesh,
    )


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """How long an operation of the group may take, from now on. Local: no rank waits for others."""
    # torch 2.14 has made it public, and warns of the old name.
    setter = vars(dist).get("set_timeout", distributed_c10d._set_pg_timeout)
    setter(timeout, group)


def _share_memory(axis: Axis, device: torch.device) -> Axis:
    """The axis with collectives through memory, where that can be."""
    if axis.group is None or device.type != "cpu":
        return axis
    return replace(axis, shared=connect_collectives(axis.group, axis.name, COLLECTIVE_TIMEOUT))


def split_world(name: str, groups: Sequence[Sequence[int]]) -> Axis:
    """Make one process group for each of the disjoint `groups`; return the caller's own.

    Collective: every rank of the world calls it with the same groups in the same order. A rank that
    is in none of them gets an axis of itself alone.
    """
    own = Axis(name, (dist.get_rank(),))
    for ranks in groups:
        group = None
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT)
        if dist.get_rank() in ranks:
            own = Axis(name, tuple(ranks), list(ranks).index(dist.get_rank()), group)
    if dist.get_backend() == dist.Backend.GLOO:
        dist.barrier()  # a rank that has connected and leaves would fail those that still connect
    return own
