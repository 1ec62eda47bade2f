"""Flat buffers lay parameters out once; reduction sums what is partial, and counts norms once."""

from typing import Any

import pytest
import torch
from torch import nn

from megapipe.data_parallel.buffer import ALIGNMENT, build_buffers
from megapipe.data_parallel.reduce import local_squared_norm, reduce_gradients
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.layout.axes import Axes
from megapipe.layout.parameters import (
    FIRST,
    LAST,
    Init,
    ParameterShard,
    ParameterSpec,
    Split,
    shard_of,
)
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.collectives import all_reduce_
from megapipe.tensor_parallel.parameter import ShardedParameter
from tests.interpreter import needs_interpreter
from tests.ranks import run_ranks

CPU, FLOAT64 = torch.device("cpu"), torch.float64
ZEROS = Init("zeros")
GROUPS = ((Role.MATRIX, Role.EMBEDDING, Role.OUTPUT), (Role.NORM, Role.BIAS))


def parameter(
    name: str, *shape: int, role: Role = Role.MATRIX, dtype: torch.dtype = torch.float32
) -> ShardedParameter:
    shard = ParameterShard(ParameterSpec(name, shape, (0,), ZEROS, role), (0,) * len(shape), shape)
    made = ShardedParameter((shard,), dtype=dtype, device=CPU)
    made.data.copy_(torch.arange(made.numel()).view(shape))
    return made


class Holder(nn.Module):
    def __init__(self, *parameters: ShardedParameter) -> None:
        super().__init__()
        for index, one in enumerate(parameters):
            self.register_parameter(f"p{index}", one)


def test_parameters_move_into_the_buffer_with_their_values() -> None:
    a, b, c = parameter("a", 3, 5), parameter("b", 7, role=Role.NORM), parameter("c", 130)
    stages = [Holder(a, b), Holder(c, a)]  # a is shared by two stages
    buffers = build_buffers(stages, GROUPS, main_dtype=torch.float32, replicas=3)
    assert [[slot.parameter for slot in buffer.slots] for buffer in buffers] == [[a, c], [b]]
    for buffer in buffers:
        assert len(buffer.weights) % (ALIGNMENT * 3) == 0
        assert buffer.master is buffer.weights, "one dtype needs one copy"
        for slot in buffer.slots:
            assert slot.offset % ALIGNMENT == 0
            own = slot.parameter
            assert torch.equal(own.data, torch.arange(own.numel()).view(own.shape))
            assert own.data.data_ptr() == buffer.weights[slot.offset :].data_ptr()
            (own.square().sum()).backward()
            assert own.grad is None
            assert torch.equal(slot.view(buffer.gradients), 2 * own.detach())


def test_bfloat16_weights_have_float32_masters_that_are_published() -> None:
    a = parameter("a", 4, dtype=torch.bfloat16)
    (buffer,) = build_buffers([Holder(a)], GROUPS, main_dtype=torch.float32, replicas=1)
    assert buffer.master.dtype == buffer.gradients.dtype == torch.float32
    buffer.master.fill_(1 + 2**-12)
    assert a[0] == 0
    buffer.publish_master()
    assert a[0] == 1, "rounded to bfloat16"
    assert buffer.master[0] == 1 + 2**-12


def table(tensor: int) -> dict[str, tuple[ParameterSpec, tuple[str, ...], int]]:
    """A parameter of each kind, the axes over which a replica sums its gradient, and its elements
    that a stage's ranks count together (all ranks, of one that has two places)."""
    rows, ends = Split(0), (FIRST, LAST)

    def norm(name: str, partial: str, places: tuple[Any, ...] = (0,)) -> ParameterSpec:
        return ParameterSpec(name, (5,), places, ZEROS, Role.NORM, partial=partial)

    def matrix(name: str, split: Split, places: tuple[Any, ...] = (0,)) -> ParameterSpec:
        return ParameterSpec(name, (4 * tensor, 3), places, ZEROS, Role.MATRIX, split)

    return {
        "partial": (norm("partial", "sequence"), ("tensor",), 5),
        "partial2": (norm("partial2", "always"), ("tensor",), 5),
        "complete": (norm("complete", "never"), (), 5),
        "rows": (matrix("rows", rows), (), 12 * tensor),
        "copies": (matrix("copies", Split(0, units=1)), ("tensor",), 12 * tensor),
        "tied": (matrix("tied", rows, ends), ("pipeline",), 12 * tensor),
        "tied norm": (norm("tied norm", "always", ends), ("pipeline", "tensor"), 5),
    }


def shard_on(
    spec: ParameterSpec, axes: Axes, pipeline_rank: int, tensor_rank: int
) -> ParameterShard:
    return shard_of(
        spec,
        tensor_rank=tensor_rank,
        tensor_size=axes.size("tensor"),
        sequence_parallel=True,
        holders=tuple(range(axes.size("pipeline"))) if len(spec.places) > 1 else (pipeline_rank,),
        pipeline_rank=pipeline_rank,
    )


def mesh_for(axes: Axes, specs: list[ParameterSpec]) -> Mesh:
    """With the groups that sum these parameters' gradients."""
    mesh = build_mesh(axes, CPU)
    tensor_ranks = range(axes.size("tensor"))
    found = {
        shard_on(spec, axes, 0, rank).reduction_group for spec in specs for rank in tensor_ranks
    }
    mesh.connect_reduction_groups(sorted(group for group in found if group is not None))
    return mesh


def _reduced(pipeline: int, data: int, tensor: int) -> None:
    """Rank r adds r + 1 to every gradient; each kind of parameter is summed over its own ranks."""
    kinds = table(tensor)
    axes = Axes.of(pipeline=pipeline, data=data, tensor=tensor)
    mesh = mesh_for(axes, [spec for spec, _, _ in kinds.values()])
    members = {}
    for name, (spec, _, _) in kinds.items():
        shard = shard_on(spec, axes, mesh.pipeline.rank, mesh.tensor.rank)
        members[name] = ShardedParameter((shard,), dtype=FLOAT64, device=CPU)
    buffers = build_buffers([Holder(*members.values())], GROUPS, main_dtype=FLOAT64, replicas=data)
    for one in members.values():
        one.main_grad.fill_(mesh.rank + 1)
    reduce_gradients(buffers, mesh)

    for name, (_, over, _) in kinds.items():
        (group,) = [one for one in axes.groups(*over, "data") if mesh.rank in one]
        given = sum(rank + 1 for rank in group)
        assert (members[name].main_grad == given).all(), (name, members[name].main_grad, given)

    # The norm over a replica counts every global element once.
    for one in members.values():
        one.main_grad.fill_(1.0)
    squared = all_reduce_(local_squared_norm(buffers, "torch").clone(), mesh.model_parallel)
    expected = sum(
        elements * (pipeline if len(spec.places) == 1 else 1)
        for spec, _, elements in kinds.values()
    )
    assert abs(float(squared) - expected) < 1e-9


def test_partial_gradients_are_summed_over_their_ranks_and_replicas() -> None:
    run_ranks(_reduced, 4, 1, 2, 2)
    run_ranks(_reduced, 4, 2, 1, 2)
    run_ranks(_reduced, 4, 2, 2, 1)
    run_ranks(_reduced, 1, 1, 1, 1)


def _copies(units: int) -> float:
    """Rank r adds 10^r: of four ranks, those that hold the same unit add up."""
    spec = ParameterSpec("heads", (8, 3), (0,), ZEROS, Role.MATRIX, Split(0, units))
    mesh = mesh_for(Axes.of(tensor=4), [spec])
    one = ShardedParameter((shard_on(spec, mesh.axes, 0, mesh.rank),), dtype=FLOAT64, device=CPU)
    buffers = build_buffers([Holder(one)], GROUPS, main_dtype=FLOAT64, replicas=1)
    one.main_grad.fill_(10**mesh.rank)
    reduce_gradients(buffers, mesh)
    (total,) = set(one.main_grad.flatten().tolist())
    one.main_grad.fill_(1.0)
    squared = all_reduce_(local_squared_norm(buffers, "torch").clone(), mesh.world)
    assert abs(float(squared) - 8 * 3) < 1e-9
    return total


@pytest.mark.parametrize(
    ("units", "sums"),
    [(1, [1111] * 4), (2, [11, 11, 1100, 1100]), (4, [1, 10, 100, 1000])],
)
def test_copies_are_summed_over_the_ranks_that_hold_them(units: int, sums: list[float]) -> None:
    assert run_ranks(_copies, 4, units) == sums


@needs_interpreter
def test_owned_runs_are_the_owned_elements_and_padding() -> None:
    """Two owned in a row are one run, over padding too; what another rank owns ends it."""

    def stacked(*owned: bool) -> ShardedParameter:
        specs = [
            ParameterSpec(f"p{i}", (2, 3), (0,), ZEROS, Role.MATRIX) for i in range(len(owned))
        ]
        shards = [
            ParameterShard(spec, (0, 0), (2, 3), padding=int(spec is specs[-1]), owner=own)
            for spec, own in zip(specs, owned, strict=True)
        ]
        return ShardedParameter(tuple(shards), dtype=torch.float32, device=CPU)

    members = [stacked(True, True), stacked(True, False, True), stacked(False), stacked(True)]
    (buffer,) = build_buffers(
        [Holder(*members)], [tuple(Role)], main_dtype=torch.float32, replicas=1
    )
    # Parameters begin at multiples of 64 elements; a shard has 6.
    assert buffer.owned_runs() == [slice(0, 70), slice(76, 82), slice(192, 198)]
    generator = torch.Generator().manual_seed(0)
    for shard, view in buffer.shards(buffer.gradients):
        view.copy_(torch.randn(shard.shape, generator=generator))
    norms = [float(local_squared_norm([buffer], backend)) for backend in ("torch", "triton")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    buffer.gradients.zero_()
    for shard, view in buffer.shards(buffer.gradients):
        view.fill_(0.0 if shard.owner else 1.0)
    assert float(local_squared_norm([buffer], "triton")) == 0
