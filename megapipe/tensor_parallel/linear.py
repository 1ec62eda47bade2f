"""Column- and row-parallel linear layers (Shoeybi et al. 2019), sequence parallelism included
(Korthikanti et al. 2022).

    column: Y_i = X W_i^T      W cut along its output rows; X whole (or gathered along S)
    row:    Y = sum_i X_i W_i^T    W cut along its input columns; Y summed (or scattered along S)

The weight gradient goes to a `WeightGradStore` and from there straight into `main_grad`; autograd
sees only the input gradient. The parameter is kept on ctx because under activation recompute
`saved_tensors` returns another tensor, whose `main_grad` would be lost.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapipe.distributed.mesh import Axis
from megapipe.kernels import add_weight_grad
from megapipe.tensor_parallel.collectives import (
    Pending,
    all_gather,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    sum_partial,
)
from megapipe.tensor_parallel.parameter import ShardedParameter
from megapipe.tensor_parallel.weight_grad import WeightGradStore


class ColumnParallelLinear(nn.Module):
    """[S_local, B, in] -> [S, B, local out]: one or more stacked global weights in one matmul.

    `weight` holds this rank's rows of [out, in] weights (query, key and value, say). Under sequence
    parallelism the input is this rank's part of the sequence and is gathered here.
    """

    def __init__(
        self,
        weight: ShardedParameter,
        bias: ShardedParameter | None,
        *,
        tensor: Axis,
        sequence_parallel: bool,
        store: WeightGradStore,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
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

    `weight` holds this rank's columns of an [out, in] weight. Under sequence parallelism the sum is
    scattered along the sequence, and the bias, added to the scattered part, has a partial gradient
    on each rank.
    """

    def __init__(
        self,
        weight: ShardedParameter,
        bias: ShardedParameter | None,
        *,
        tensor: Axis,
        sequence_parallel: bool,
        store: WeightGradStore,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
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
