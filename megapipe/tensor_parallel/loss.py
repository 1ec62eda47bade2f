"""Cross-entropy over a vocabulary that is cut over tensor ranks; logits are never gathered.

    loss = sum over tokens of log(sum_v exp(x_v - m)) + m - x_target,    m = max_v x_v

Each rank finds its own maximum, sum of exponentials and target logit; three numbers per token cross
the ranks. The gradient softmax(x) - onehot(target) is written over the logits.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapipe import kernels
from megapipe.mesh import Axis
from megapipe.tensor_parallel.collectives import all_reduce_


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, *, vocab_size: int, tensor: Axis
) -> Tensor:
    """Scalar sum of the losses of [...] targets, given this rank's [..., columns] of the logits.

    Columns beyond `vocab_size` are padding and count as minus infinity. Ignored targets
    (`IGNORED_TARGET`) give no loss and no gradient. Sums are float32 (float64 for float64 logits).
    The logits are overwritten, in forward already; only their producer may have saved them.
    """
    loss: Tensor = _CrossEntropy.apply(
        logits.flatten(0, -2), targets.reshape(-1), vocab_size, tensor
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, vocab_size: int, tensor: Axis
    ) -> Tensor:
        columns = logits_NV.shape[1]
        first = tensor.rank * columns
        valid = min(max(vocab_size - first, 0), columns)
        max_N = all_reduce_(kernels.row_max(logits_NV, valid), tensor, dist.ReduceOp.MAX)
        sums_2N = torch.stack(
            kernels.exp_sum_and_target_(logits_NV, max_N, targets_N, first, valid)
        )
        sum_N, target_N = all_reduce_(sums_2N, tensor)
        ctx.save_for_backward(logits_NV, max_N, sum_N, targets_N)
        ctx.first, ctx.valid = first, valid
        return torch.where(targets_N >= 0, sum_N.log() + max_N - target_N, 0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, max_N, sum_N, targets_N = ctx.saved_tensors
        grad_NV = kernels.softmax_gradient_(
            logits_NV, max_N, sum_N, targets_N, ctx.first, ctx.valid, grads[0]
        )
        return grad_NV, None, None, None
