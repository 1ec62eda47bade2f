"""Collectives through memory: the same results as the group's, the same bits on all ranks."""

import pytest
import torch
import torch.distributed as dist

from megapipe.distributed.mesh import Axis, Mesh, build_mesh
from megapipe.distributed.shared_memory import connect
from megapipe.layout.axes import Axes
from megapipe.tensor_parallel.collectives import (
    all_gather,
    all_reduce_,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def tensor_mesh(size: int) -> Mesh:
    return build_mesh(Axes.of(pipeline=1, data=1, tensor=size), CPU)


def part(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of such different sizes that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    return (values * 10.0 ** torch.randint(-6, 6, values.shape, generator=generator)).to(dtype)


Results = dict[str, list[torch.Tensor]]


def all_collectives(dtype: torch.dtype) -> Results:
    """Of each kind: through memory, and through the group."""
    size = dist.get_world_size()
    axis = tensor_mesh(size).tensor
    assert axis.shared is not None
    group = Axis(axis.name, axis.ranks, axis.rank, axis.group)
    x = part(axis.rank, 3 * size, dtype)
    return {
        "all-gather": [all_gather(x, of) for of in (axis, group)],
        "all-reduce": [start_all_reduce(x.clone(), of).wait() for of in (axis, group)],
        "maximum": [all_reduce_(x.clone(), of, dist.ReduceOp.MAX) for of in (axis, group)],
        "reduce-scatter": [start_reduce_scatter(x, of).wait() for of in (axis, group)],
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_are_the_groups(size: int, dtype: torch.dtype) -> None:
    answers: list[Results] = run_ranks(all_collectives, size, dtype)
    parts = [part(rank, 3 * size, dtype) for rank in range(size)]
    total = parts[0]
    for other in parts[1:]:
        total = total + other
    for rank, results in enumerate(answers):
        assert torch.equal(*results["all-gather"])
        assert torch.equal(*results["maximum"])
        for kind, expected in (
            ("all-reduce", total),
            ("reduce-scatter", total[3 * rank : 3 * rank + 3]),
        ):
            shared, group = results[kind]
            assert torch.equal(shared, expected), "added in rank order, everywhere"
            torch.testing.assert_close(shared, group, rtol=size * torch.finfo(dtype).eps, atol=1e-4)


def out_of_order() -> bool:
    """Waited for in another order than begun."""
    axis = tensor_mesh(2).tensor
    for turn in range(100):
        a, b, c = (torch.full((4,), float(axis.rank + turn + n)) for n in range(3))
        pending = [start_all_reduce(a, axis), start_all_gather(b, axis), start_all_reduce(c, axis)]
        last, gathered, first = (one.wait() for one in reversed(pending))
        assert first.tolist() == [1.0 + 2 * turn] * 4
        assert last.tolist() == [5.0 + 2 * turn] * 4
        assert gathered.tolist() == [1.0 + turn] * 4 + [2.0 + turn] * 4
    return True


def test_collectives_under_way_are_told_apart() -> None:
    assert run_ranks(out_of_order, 2) == [True, True]


def nothing() -> list[tuple[int, ...]]:
    axis = tensor_mesh(2).tensor
    x = torch.empty(0, 5)
    starts = (start_all_reduce, start_all_gather, start_reduce_scatter)
    results = [start(x, axis).wait() for _ in range(2) for start in starts]
    assert all_reduce_(torch.ones(2), axis).tolist() == [2.0, 2.0], "and what comes after is right"
    return [tuple(result.shape) for result in results]


def test_tensors_may_be_empty() -> None:
    assert run_ranks(nothing, 2) == [[(0, 5)] * 6] * 2


def slots_used(times: int) -> int:
    axis = tensor_mesh(3).tensor
    assert axis.shared is not None
    for _ in range(times):
        all_reduce_(torch.ones(1000), axis)
    return max(len(channel._sizes) for channel in axis.shared._outward.values())


def test_memory_is_used_again() -> None:
    assert max(run_ranks(slots_used, 3, 200)) < 16


def gone() -> str:
    axis = tensor_mesh(3).tensor
    rank, said = axis.rank, ""
    if rank == 1:
        del axis
    dist.barrier()  # it is gone before the others need it,
    if rank != 1:
        with pytest.raises(ConnectionError) as caught:
            all_reduce_(torch.ones(3), axis)
        said = str(caught.value)
    dist.barrier()  # and they stay until both have seen it
    return said


def test_who_needs_a_rank_that_is_gone_is_told() -> None:
    assert run_ranks(gone, 3) == ["tensor rank 1 has ended", "", "tensor rank 1 has ended"]


def where_one_can_not() -> tuple[bool, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(connect.resource, "getrlimit", lambda _: (100_000, -1))
        axis = tensor_mesh(2).tensor
    return axis.shared is None, all_reduce_(torch.ones(3), axis).tolist()


def test_all_ranks_use_the_group_where_one_can_not_share() -> None:
    assert run_ranks(where_one_can_not, 2) == [(True, [2.0] * 3)] * 2


def axes_that_share() -> list[str]:
    mesh = build_mesh(Axes.of(pipeline=2, data=1, tensor=2), CPU)
    axes = (mesh.pipeline, mesh.batch, mesh.tensor, mesh.model_parallel, mesh.world)
    assert mesh.tensor.shared is not None
    assert list(mesh.tensor.shared._outward) == [1 - mesh.tensor.rank], "of two ranks, the other"
    return [axis.name for axis in axes if axis.shared is not None]


def test_the_tensor_axis_alone_shares_memory() -> None:
    assert run_ranks(axes_that_share, 4) == [["tensor"]] * 4
