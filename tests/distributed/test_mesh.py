"""The mesh: who stands where, and groups that join the ranks they say."""

import time
import warnings
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megapipe.distributed.mesh import Axis, Mesh, build_mesh, set_group_timeout, split_world
from megapipe.layout.axes import Axes
from megapipe.tensor_parallel.collectives import all_gather
from tests.ranks import run_ranks

CPU = torch.device("cpu")
LAYOUTS = [(2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1)]


def _describe_mesh(pipeline: int, data: int, tensor: int) -> dict[str, list[int]]:
    """For each axis, the ranks that a gather over it brings together."""
    mesh = build_mesh(Axes.of(pipeline=pipeline, data=data, tensor=tensor), CPU)
    assert mesh.rank == dist.get_rank()
    assert mesh.axes.coordinates(mesh.rank) == {n: axis.rank for n, axis in mesh.parts.items()}
    axes = (mesh.pipeline, mesh.batch, mesh.tensor, mesh.model_parallel, mesh.world)
    for axis in axes:
        gathered = all_gather(torch.tensor([mesh.rank]), axis)
        assert gathered.tolist() == list(axis.ranks)
        assert axis.ranks[axis.rank] == mesh.rank
        assert axis.rank_group.all_gather(mesh.rank) == list(axis.ranks)
    return {axis.name: list(axis.ranks) for axis in axes}


@pytest.mark.parametrize(("pipeline", "data", "tensor"), LAYOUTS)
def test_axes_join_the_ranks_that_share_the_other_coordinates(
    pipeline: int, data: int, tensor: int
) -> None:
    found = run_ranks(_describe_mesh, pipeline * data * tensor, pipeline, data, tensor)
    grid = {
        place: rank
        for rank, place in enumerate(product(range(pipeline), range(data), range(tensor)))
    }
    for (p, d, t), rank in grid.items():
        assert found[rank] == {
            "pipeline": [grid[i, d, t] for i in range(pipeline)],
            "data": [grid[p, i, t] for i in range(data)],
            "tensor": [grid[p, d, i] for i in range(tensor)],
            "model_parallel": [grid[i, d, j] for i in range(pipeline) for j in range(tensor)],
            "world": list(range(len(grid))),
        }


def test_one_process_is_a_mesh_of_ones_without_a_process_group() -> None:
    mesh = build_mesh(Axes.of(), CPU)
    assert mesh == Mesh.single(CPU)
    assert not dist.is_initialized()
    axes = (mesh.pipeline, mesh.batch, mesh.tensor, mesh.model_parallel, mesh.world)
    assert all(axis.size == 1 and axis.group is None and axis.is_first for axis in axes)
    assert torch.equal(all_gather(torch.arange(3), mesh.tensor), torch.arange(3))


def _leads_stages() -> bool:
    return build_mesh(Axes.of(pipeline=2, data=2, tensor=2), CPU).leads_stages


def test_one_rank_leads_those_that_compute_the_same_stages() -> None:
    assert run_ranks(_leads_stages, 8) == [rank in (0, 4) for rank in range(8)]


TENSOR = (("tensor", (0, 1)),)
PIPELINE_ENDS = (("pipeline", (0, 2)),)
ENDS_AND_TENSOR = (("pipeline", (0, 2)), ("tensor", (0, 1)))


def _reduction_groups() -> list[tuple[int, ...]]:
    mesh = build_mesh(Axes.of(pipeline=3, tensor=2), CPU)
    groups = sorted([TENSOR, PIPELINE_ENDS, ENDS_AND_TENSOR])
    mesh.connect_reduction_groups(groups)
    assert mesh.reduction_axes[TENSOR] is mesh.tensor, "a whole axis has its group already"
    made = dict(mesh.reduction_axes)
    mesh.connect_reduction_groups(groups)
    assert all(mesh.reduction_axes[group] is axis for group, axis in made.items()), "made once"
    for axis in made.values():
        assert all_gather(torch.tensor([mesh.rank]), axis).tolist() == list(axis.ranks)
        assert axis.group is None or axis.group in mesh.groups
    return [mesh.reduction_axes[group].ranks for group in (TENSOR, PIPELINE_ENDS, ENDS_AND_TENSOR)]


def test_reduction_groups_join_the_ranks_at_these_places() -> None:
    """Ranks 2 and 3 are in the middle of the pipeline and sum with nobody there."""
    ends = (0, 1, 4, 5)
    assert run_ranks(_reduction_groups, 6) == [
        [(0, 1), (0, 4), ends],
        [(0, 1), (1, 5), ends],
        [(2, 3), (2,), (2,)],
        [(2, 3), (3,), (3,)],
        [(4, 5), (0, 4), ends],
        [(4, 5), (1, 5), ends],
    ]


def _waits_in_vain() -> None:
    """A sum that the other rank does not take part in fails once the group has a short timeout."""
    world = dist.group.WORLD
    assert world is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch 2.14 warns of the name that older ones have
        set_group_timeout(world, timedelta(seconds=0.3))
    if dist.get_rank() == 1:
        time.sleep(3)  # with its connections open
        return
    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        dist.all_reduce(torch.zeros(1))


def test_a_group_has_the_timeout_that_it_is_given() -> None:
    run_ranks(_waits_in_vain, 2)


def _two_meshes() -> tuple[int, int]:
    """Two meshes over the same ranks live side by side and do not mix."""
    one = build_mesh(Axes.of(tensor=2), CPU)
    other = build_mesh(Axes.of(pipeline=2), CPU)
    value = torch.tensor([dist.get_rank() + 1])
    return (
        int(all_gather(value, one.tensor).sum()) * int(all_gather(value, one.pipeline).sum()),
        int(all_gather(value, other.tensor).sum()) * int(all_gather(value, other.pipeline).sum()),
    )


def test_two_meshes_live_in_one_process() -> None:
    assert run_ranks(_two_meshes, 2) == [(3, 3), (6, 6)]


def _own_group(groups: list[list[int]]) -> Axis:
    axis = split_world("x", groups)
    total = all_gather(torch.tensor([dist.get_rank()]), axis)
    assert total.tolist() == list(axis.ranks)
    return Axis(axis.name, axis.ranks, axis.rank)


def test_splitting_the_world_leaves_others_alone() -> None:
    found = run_ranks(_own_group, 4, [[0, 3], [1]])
    assert [axis.ranks for axis in found] == [(0, 3), (1,), (2,), (0, 3)]
    assert [axis.rank for axis in found] == [0, 0, 0, 1]


def when_a_rank_is_late() -> tuple[float, float]:
    """When this rank had made its group, rank 0 late, and when it went on."""
    made = []

    def make_group(*arguments: Any, **more: Any) -> Any:
        group = new_group(*arguments, **more)
        if dist.get_rank() == 0:
            time.sleep(0.3)
        made.append(time.monotonic())
        return group

    new_group = dist.new_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", make_group)
        split_world("pair", [[0, 1]])
    return made[-1], time.monotonic()


def test_nobody_leaves_while_others_connect() -> None:
    """Gloo fails those to whom a rank has connected that is gone before they have noticed."""
    reports = run_ranks(when_a_rank_is_late, 2)
    assert min(end for _, end in reports) > max(made for made, _ in reports)
