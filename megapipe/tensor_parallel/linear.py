"""Column- and row-parallel linear layers (Shoeybi et al. 2019), sequence parallelism included
(Korthikanti et al. 2022).

    column: Y_i = X W_i^T      W cut along its output rows; X whole (or gathered along S)
    row:    Y = sum_i X_i W_i^T    W cut along its input columns; Y summed (or scattered along S)

The weight gradient goes to a `WeightGradStore` and from there straight into `main_grad`; autograd
sees only the input gradient. The parameter is kept on ctx because under activation recompute
`saved_tensors` returns another tensor, whose `main_grad` would be lost.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapipe.distributed.mesh import Axis
from megapipe.kernels import add_weight_grad
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.collectives import (
    Pending,
    all_gather,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    sum_partial,
)
from megapipe.tensor_parallel.parameter import Piece, ShardedParameter
from megapipe.tensor_parallel.weight_grad import WeightGradStore


class ColumnParallelLinear(nn.Module):
    """[S_local, B, in] -> [S, B, local out]: several stacked global weights in one matmul.

    `pieces` are this rank's rows of one or more [out, in] weights (query, key and value, say); with
    `bias` each gets a bias of the name with `.bias` for `.weight`. Under sequence parallelism the
    input is this rank's part of the sequence and is gathered here.
    """

    def __init__(
        self,
        in_features: int,
        pieces: Sequence[Piece],
        *,
        bias: bool,
        tensor: Axis,
        sequence_parallel: bool,
        store: WeightGradStore,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        stacked = _stack(pieces)
        rows = sum(piece.shape[0] for piece in stacked)
        self.weight = ShardedParameter(
            (rows, in_features), stacked, role=Role.MATRIX, dtype=dtype, device=device
        )
        self.bias = None
        if bias:
            biases = tuple(_bias_piece(piece) for piece in stacked)
            self.bias = ShardedParameter(
                (rows,), biases, role=Role.BIAS, dtype=dtype, device=device
            )
        self.tensor = tensor
        self.sequence_parallel = sequence_parallel
        self.store = store

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        """Without `add_bias` the caller adds it, in what it fuses with the addition."""
        return column_parallel_linear(
            x,
            self.weight,
            self.bias if add_bias else None,
            tensor=self.tensor,
            sequence_parallel=self.sequence_parallel,
            store=self.store,
        )


class RowParallelLinear(nn.Module):
    """[S, B, local in] -> [S_local, B, out], summed over tensor ranks.

    Under sequence parallelism the sum is scattered along the sequence, and the bias, added to the
    scattered part, has a partial gradient on each rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        name: str,
        *,
        bias: bool,
        tensor: Axis,
        sequence_parallel: bool,
        store: WeightGradStore,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        local = in_features // tensor.size
        shape = (out_features, local)
        piece = Piece(name, (out_features, in_features), (0, local * tensor.rank), shape)
        self.weight = ShardedParameter(
            shape, (piece,), role=Role.MATRIX, dtype=dtype, device=device
        )
        self.bias = None
        if bias:
            self.bias = replicated_parameter(
                name.removesuffix(".weight") + ".bias",
                (out_features,),
                role=Role.BIAS,
                tensor=tensor,
                partial_gradient=sequence_parallel,
                dtype=dtype,
                device=device,
            )
        self.tensor = tensor
        self.sequence_parallel = sequence_parallel
        self.store = store

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RowParallel.apply(
            x, self.weight, self.tensor, self.sequence_parallel, self.store
        )
        return y if self.bias is None else y + self.bias


def column_parallel_linear(
    x: Tensor,
    weight: ShardedParameter,
    bias: ShardedParameter | None,
    *,
    tensor: Axis,
    sequence_parallel: bool,
    store: WeightGradStore,
) -> Tensor:
    """The function of `ColumnParallelLinear`, for weights that another layer owns (tied heads)."""
    y: Tensor = _ColumnParallel.apply(x, weight, bias, tensor, sequence_parallel, store)
    return y


def replicated_parameter(
    name: str,
    shape: tuple[int, ...],
    *,
    role: Role,
    tensor: Axis,
    partial_gradient: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> ShardedParameter:
    """A whole global tensor on every tensor rank.

    `partial_gradient`: each rank sees only part of the sequence or of the heads, so the gradients
    must be summed; else all ranks compute the same gradient.
    """
    piece = Piece(
        name,
        global_shape=shape,
        start=(0,) * len(shape),
        shape=shape,
        sum_over=tensor if partial_gradient and tensor.size > 1 else None,
        counted=tensor.is_first,
    )
    return ShardedParameter(shape, (piece,), role=role, dtype=dtype, device=device)


def _stack(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    stacked, row = [], 0
    for piece in pieces:
        stacked.append(replace(piece, row=row))
        row += piece.shape[0]
    return tuple(stacked)


def _bias_piece(piece: Piece) -> Piece:
    return replace(
        piece,
        name=piece.name.removesuffix(".weight") + ".bias",
        global_shape=piece.global_shape[:1],
        start=piece.start[:1],
        shape=piece.shape[:1],
    )


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: ShardedParameter,
        bias: ShardedParameter | None,
        tensor: Axis,
        sequence_parallel: bool,
        store: WeightGradStore,
    ) -> Tensor:
        ctx.save_for_backward(x)  # the shard: backward gathers again rather than hold S * B * in
        ctx.weight, ctx.has_bias, ctx.tensor, ctx.store = weight, bias is not None, tensor, store
        ctx.gathers = sequence_parallel and tensor.size > 1
        return F.linear(all_gather(x, tensor) if ctx.gathers else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        (x,) = ctx.saved_tensors
        weight, tensor, store = ctx.weight, ctx.tensor, ctx.store
        gathering = None
        if ctx.gathers and not store.deferred:  # overlaps the gather with the input gradient
            gathering = start_all_gather(x, tensor)
        grad_in = grad_out @ weight
        start = start_reduce_scatter if ctx.gathers else start_all_reduce
        reducing: Pending = start(grad_in, tensor)

        def weight_grad() -> None:  # overlaps the reduction of the input gradient
            inputs = x
            if ctx.gathers:
                inputs = gathering.wait() if gathering is not None else all_gather(x, tensor)
            add_weight_grad(weight.main_grad, grad_out, inputs, backend=store.backend)

        store.push(weight_grad)
        grad_bias = grad_out.flatten(0, -2).sum(0) if ctx.has_bias else None
        return reducing.wait(), None, grad_bias, None, None, None


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: ShardedParameter,
        tensor: Axis,
        sequence_parallel: bool,
        store: WeightGradStore,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.tensor, ctx.store = weight, tensor, store
        ctx.scatters = sequence_parallel and tensor.size > 1
        return sum_partial(F.linear(x, weight), tensor, sequence_parallel=sequence_parallel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        if ctx.scatters:
            grad_out = all_gather(grad_out, ctx.tensor)
        grad_in = grad_out @ weight
        backend = ctx.store.backend
        ctx.store.push(lambda: add_weight_grad(weight.main_grad, grad_out, x, backend=backend))
        return grad_in, None, None, None, None
