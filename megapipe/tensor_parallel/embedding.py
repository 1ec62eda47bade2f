"""The vocabulary cut over tensor ranks: embedding and its padding."""

from typing import Any

import torch
from torch import Tensor, nn

from megapipe.distributed.mesh import Axis
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.collectives import all_gather, sum_partial
from megapipe.tensor_parallel.parameter import Piece, ShardedParameter
from megapipe.tensor_parallel.vocabulary import vocabulary_rows


def vocabulary_parameter(
    name: str,
    vocab_size: int,
    hidden_size: int,
    *,
    role: Role,
    tensor: Axis,
    dtype: torch.dtype,
    device: torch.device,
) -> ShardedParameter:
    """This rank's [rows, hidden] of a [vocab, hidden] weight; the last may be part padding."""
    rows = vocabulary_rows(vocab_size, tensor.size)
    start = min(rows * tensor.rank, vocab_size)
    own = min(rows, vocab_size - start)
    piece = Piece(name, (vocab_size, hidden_size), (start, 0), (own, hidden_size))
    return ShardedParameter((rows, hidden_size), (piece,), role=role, dtype=dtype, device=device)


class VocabParallelEmbedding(nn.Module):
    """tokens [B, S] -> [S_local, B, H]: each rank looks up its rows, the ranks' results are summed.

    Under sequence parallelism the sum is scattered, so each rank gets its part of the sequence.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        *,
        tensor: Axis,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.weight = vocabulary_parameter(
            name,
            vocab_size,
            hidden_size,
            role=Role.EMBEDDING,
            tensor=tensor,
            dtype=dtype,
            device=device,
        )
        self.tensor = tensor
        self.sequence_parallel = sequence_parallel

    def forward(self, tokens_BS: Tensor) -> Tensor:
        rows_SB = tokens_BS.t() - self.tensor.rank * self.weight.shape[0]
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
