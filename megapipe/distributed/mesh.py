"""The mesh: where a rank stands on the axes of a layout, and whom it communicates with there.

A mesh is built once and passed down; nothing here is global, and two meshes can live in one
process. An axis of size one exists like any other and its collectives cost nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from megapipe.config.axes import Splits
from megapipe.distributed.rank_group import RankGroup
from megapipe.distributed.shared_memory.collectives import (
    SharedMemoryCollectives,
    connect_collectives,
)
from megapipe.layout.axes import Axes
from megapipe.layout.parameters import ReductionGroup

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
    """Where one rank stands on the axes of a layout, and the groups of ranks that it belongs to.

    `parts` has an Axis for each axis of the layout. `batch` joins the ranks that read different
    samples of a global batch, over which whole gradients are summed; `model_parallel` those that
    share a batch index: together they own one copy of the model and read one share of each batch.
    `world` holds all ranks.
    """

    device: torch.device
    axes: Axes
    parts: Mapping[str, Axis]
    batch: Axis
    model_parallel: Axis
    world: Axis
    reduction_axes: dict[ReductionGroup, Axis] = field(
        default_factory=dict, compare=False, repr=False
    )
    """This rank's groups that add up partial gradients, made by `connect_reduction_groups`."""
    split_groups: list[dist.ProcessGroup] = field(default_factory=list, compare=False, repr=False)
    """This rank's groups that `split` has made."""

    @staticmethod
    def single(device: torch.device) -> "Mesh":
        """The mesh of one process: every axis has size one and no process group is needed."""
        axes = Axes.of()
        return Mesh(
            device,
            axes,
            parts={name: Axis(name) for name in axes.names},
            batch=Axis("batch"),
            model_parallel=Axis("model_parallel"),
            world=Axis("world"),
        )

    @property
    def pipeline(self) -> Axis:
        return self.parts["pipeline"]

    @property
    def tensor(self) -> Axis:
        return self.parts["tensor"]

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Each process group of this rank once."""
        axes = (*self.parts.values(), self.batch, self.model_parallel, self.world)
        own = [axis.group for axis in axes if axis.group is not None]
        return list(dict.fromkeys([*own, *self.split_groups]))

    def split(self, name: str, groups: Sequence[Sequence[int]]) -> Axis:
        """As `split_world`; the caller's group is one of the mesh's from then on."""
        axis = split_world(name, groups)
        if axis.group is not None:
            self.split_groups.append(axis.group)
        return axis

    def connect_reduction_groups(self, groups: Sequence[ReductionGroup]) -> None:
        """Make what `reduction_axes` lacks of these groups: the layout's, the same on every rank.

        Collective. A group that is a whole axis is that axis.
        """
        for group in groups:
            if group in self.reduction_axes:
                continue
            name = " ".join(f"{axis} {list(places)}" for axis, places in group)
            whole = [axis for axis, places in group if len(places) == self.axes.size(axis)]
            if len(group) == len(whole) == 1:
                self.reduction_axes[group] = self.parts[whole[0]]
            else:
                self.reduction_axes[group] = self.split(name, self.axes.subgroups(dict(group)))

    @property
    def leads_stages(self) -> bool:
        """It is the first of the ranks that compute the same stages."""
        others = set(self.axes.names) - set(self.axes.that_split(Splits.STAGES))
        return all(self.parts[name].is_first for name in others)

    def describe(self) -> str:
        """`rank 3 (pipeline 1, data 0, tensor 1)`."""
        return self.axes.describe(self.rank)


def build_mesh(axes: Axes, device: torch.device) -> Mesh:
    """Arrange the default process group's ranks along the axes of a layout.

    Collective: every rank of the world calls it. With a world of one no process group is needed.
    """
    if axes.world_size == 1:
        return Mesh.single(device)
    assert dist.get_world_size() == axes.world_size, (dist.get_world_size(), axes)
    device_mesh = init_device_mesh(
        device.type, tuple(axes.sizes.values()), mesh_dim_names=axes.names
    )

    def axis(name: str) -> Axis:
        part = device_mesh[name]
        ranks = tuple(part.mesh.tolist())
        group = part.get_group() if len(ranks) > 1 else None
        if group is not None:  # init_device_mesh takes no timeout and has its backend's, 10 minutes
            set_group_timeout(group, COLLECTIVE_TIMEOUT)
        return Axis(name, ranks, part.get_local_rank(), group)

    parts = {name: axis(name) for name in axes.names}
    parts["tensor"] = _share_memory(parts["tensor"], device)
    batch = axes.that_split(Splits.SAMPLES)
    others = [name for name in axes.names if name not in batch]
    return Mesh(
        device=device,
        axes=axes,
        parts=parts,
        batch=parts[batch[0]] if len(batch) == 1 else split_world("batch", axes.groups(*batch)),
        model_parallel=split_world("model_parallel", axes.groups(*others)),
        world=Axis("world", tuple(range(axes.world_size)), dist.get_rank(), dist.group.WORLD),
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
