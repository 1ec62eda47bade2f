"""The vocabulary cut over tensor ranks: embedding and its padding."""

from typing import Any

import torch
from torch import Tensor, nn

from megapipe.distributed.mesh import Axis
from megapipe.tensor_parallel.collectives import all_gather, sum_partial
from megapipe.tensor_parallel.parameter import ShardedParameter


class VocabParallelEmbedding(nn.Module):
    """tokens [B, S] -> [S_local, B, H]: each rank looks up its rows, the ranks' results are summed.

    Under sequence parallelism the sum is scattered, so each rank gets its part of the sequence.
    """

    def __init__(self, weight: ShardedParameter, *, tensor: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        (shard,) = weight.shards
        self.weight = weight
        self.first_token = shard.start[0]
        self.tensor = tensor
        self.sequence_parallel = sequence_parallel

    def forward(self, tokens_BS: Tensor) -> Tensor:
        rows_SB = tokens_BS.t() - self.first_token
        x_SBH: Tensor = _Lookup.apply(rows_SB, self.weight, self.tensor, self.sequence_parallel)
        return x_SBH


class _Lookup(torch.autograd.Function):
    """Rows of the local weight, zero for rows that lie on another rank, summed over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: ShardedParameter, tensor: Axis, sequence_parallel: bool
    ) -> Tensor:
        elsewhere = (rows < 0) | (rows >= weight.shape[0])
        rows = rows.masked_fill(elsewhere, 0)
        ctx.weight, ctx.rows, ctx.elsewhere, ctx.tensor = weight, rows, elsewhere, tensor
        ctx.scatters = sequence_parallel
        x = nn.functional.embedding(rows, weight).masked_fill_(elsewhere.unsqueeze(-1), 0)
        return sum_partial(x, tensor, sequence_parallel=sequence_parallel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        grad = all_gather(grads[0], ctx.tensor) if ctx.scatters else grads[0]
        main_grad = ctx.weight.main_grad
        values = grad.masked_fill(ctx.elsewhere.unsqueeze(-1), 0)
        rows, values = ctx.rows.flatten(), values.flatten(0, -2).to(main_grad.dtype)
        if values.is_cuda:
            # index_put_ sorts, so its order of additions is fixed; index_add_ would use atomics.
            main_grad.index_put_((rows,), values, accumulate=True)
        else:
            main_grad.index_add_(0, rows, values)
        return None, None, None, None
