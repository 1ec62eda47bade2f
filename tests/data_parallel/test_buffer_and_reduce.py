"""Flat buffers lay parameters out once; reduction sums what is partial, and counts norms once."""

import pytest
import torch
from torch import nn

from megapipe.data_parallel.buffer import ALIGNMENT, build_buffers
from megapipe.data_parallel.reduce import local_squared_norm, reduce_gradients
from megapipe.distributed.mesh import Axis, build_mesh
from megapipe.layout.axes import Axes
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.collectives import all_reduce_
from megapipe.tensor_parallel.linear import replicated_parameter
from megapipe.tensor_parallel.parameter import Piece, ShardedParameter
from tests.interpreter import needs_interpreter
from tests.ranks import run_ranks

CPU = torch.device("cpu")
GROUPS = ((Role.MATRIX, Role.EMBEDDING, Role.OUTPUT), (Role.NORM, Role.BIAS))


def parameter(name: str, *shape: int, role: Role = Role.MATRIX, dtype: torch.dtype = torch.float32):
    piece = Piece(name, shape, (0,) * len(shape), shape)
    made = ShardedParameter(shape, (piece,), role=role, dtype=dtype, device=CPU)
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


def _reduced(pipeline: int, data: int, tensor: int) -> None:
    """Rank r adds r + 1 to every gradient; each kind of parameter is summed over its own ranks."""
    mesh = build_mesh(Axes.of(pipeline=pipeline, data=data, tensor=tensor), CPU)

    def norm(name: str, *, partial: bool) -> ShardedParameter:
        return replicated_parameter(
            name,
            (5,),
            role=Role.NORM,
            tensor=mesh.tensor,
            partial_gradient=partial,
            dtype=torch.float64,
            device=CPU,
        )

    rows = Piece("rows", (4 * tensor, 3), (4 * mesh.tensor.rank, 0), (4, 3))
    cut = ShardedParameter((4, 3), (rows,), role=Role.MATRIX, dtype=torch.float64, device=CPU)
    tied = parameter("tied", 2, 3, dtype=torch.float64)
    tied.retarget(sum_over=mesh.pipeline, counted=mesh.pipeline.is_first)
    members = {
        "partial": norm("partial", partial=True),
        "partial2": norm("partial2", partial=True),
        "complete": norm("complete", partial=False),
        "rows": cut,
        "tied": tied,
    }
    buffers = build_buffers(
        [Holder(*members.values())], GROUPS, main_dtype=torch.float64, replicas=data
    )
    for one in members.values():
        one.main_grad.fill_(mesh.rank + 1)
    reduce_gradients(buffers, mesh.batch)

    def expected(over: Axis) -> int:
        """Sum over the axis and the replicas of what the ranks gave."""
        places = {
            "tensor": lambda d, i: mesh.global_rank(mesh.pipeline.rank, d, i),
            "pipeline": lambda d, i: mesh.global_rank(i, d, mesh.tensor.rank),
        }
        place = places[over.name]
        return sum(place(d, i) + 1 for d in range(data) for i in range(over.size))

    own = Axis("tensor", (mesh.rank,))
    alone = sum(mesh.global_rank(mesh.pipeline.rank, d, mesh.tensor.rank) + 1 for d in range(data))
    assert own.size == 1
    wanted = {
        "partial": expected(mesh.tensor),
        "partial2": expected(mesh.tensor),
        "complete": alone,
        "rows": alone,
        "tied": expected(mesh.pipeline),
    }
    for name, one in members.items():
        assert (one.main_grad == wanted[name]).all(), (name, one.main_grad, wanted[name])

    # The norm over a replica counts every global element once.
    for one in members.values():
        one.main_grad.fill_(1.0)
    squared = all_reduce_(local_squared_norm(buffers, "torch").clone(), mesh.model_parallel)
    per_stage = 3 * 5 + 4 * 3 * tensor
    assert abs(float(squared) - (pipeline * per_stage + 2 * 3 * tensor)) < 1e-9


def test_partial_gradients_are_summed_over_their_ranks_and_replicas() -> None:
    run_ranks(_reduced, 4, 1, 2, 2)
    run_ranks(_reduced, 4, 2, 1, 2)
    run_ranks(_reduced, 4, 2, 2, 1)
    run_ranks(_reduced, 1, 1, 1, 1)


@needs_interpreter
def test_owned_runs_are_the_counted_elements_and_padding() -> None:
    """Two counted in a row are one run, over rows of no piece too; what is not counted ends it."""

    def pieces(*counted: bool) -> ShardedParameter:
        cut = [
            Piece(f"p{i}", (2, 3), (0, 0), (2, 3), row=2 * i, counted=own)
            for i, own in enumerate(counted)
        ]
        shape = (2 * len(counted) + 1, 3)  # the last row belongs to no piece
        return ShardedParameter(
            shape, tuple(cut), role=Role.MATRIX, dtype=torch.float32, device=CPU
        )

    members = [pieces(True, True), pieces(True, False, True), pieces(False), pieces(True)]
    (buffer,) = build_buffers([Holder(*members)], [Role], main_dtype=torch.float32, replicas=1)
    # Parameters begin at multiples of 64 elements; a piece has 6.
    assert buffer.owned_runs() == [slice(0, 70), slice(76, 82), slice(192, 198)]
    generator = torch.Generator().manual_seed(0)
    for piece, view in buffer.shards(buffer.gradients):
        view.copy_(torch.randn(piece.shape, generator=generator))
    norms = [float(local_squared_norm([buffer], backend)) for backend in ("torch", "triton")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    buffer.gradients.zero_()
    for piece, view in buffer.shards(buffer.gradients):
        view.fill_(0.0 if piece.owner else 1.0)
    assert float(local_squared_norm([buffer], "triton")) == 0
