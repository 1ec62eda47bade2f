"""The local halves of cross-entropy over a vocabulary that may be cut over ranks.

    loss = log(sum_v exp(x_v - m)) + m - x_target,    m = max_v x_v
    dx_v = dloss (exp(x_v - m) / sum - [v = target])

The caller combines maxima, sums and target logits of all parts between the two halves. The gradient
is written over the logits, so no copy of [N, V] is made. Float32 logits become exp(x - m) on the
way; narrower ones stay as they are until then, and are widened a few rows at a time: a probability
near 1 in bfloat16 has no digits left for p - 1.
"""

import torch
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
"""Logits in less than float32 are widened in pieces of at most this size."""


def row_max(logits_NV: Tensor, valid: int) -> Tensor:
    """[N] float32 (float64): the maximum over the first `valid` columns, -inf if there are none."""
    wide = _wide_dtype(logits_NV)
    if valid == 0:
        return torch.full((logits_NV.shape[0],), -torch.inf, dtype=wide, device=logits_NV.device)
    return logits_NV[:, :valid].amax(dim=1).to(wide)


def exp_sum_and_target_(
    logits_NV: Tensor, max_N: Tensor, targets_N: Tensor, first: int, valid: int
) -> tuple[Tensor, Tensor]:
    """(sum of exp(x - max), logit of the target), [N] each, for `softmax_gradient_` later.

    Column c stands for class `first` + c; columns from `valid` on are padding. Where the target
    lies in another part (or is negative) its logit is 0. Logits of float32 or more are overwritten.
    """
    own, index = _own_targets(targets_N, first, valid)
    target = logits_NV.gather(1, index).squeeze(1).to(max_N.dtype)
    target_N = torch.where(own, target, 0)
    sum_N = torch.empty_like(max_N)
    for rows in _chunks(logits_NV):
        # `to` gives the logits themselves where they are wide already.
        exponentials = logits_NV[rows, :valid].to(max_N.dtype).sub_(max_N[rows, None]).exp_()
        sum_N[rows] = exponentials.sum(dim=1)
    return sum_N, target_N


def softmax_gradient_(
    logits_NV: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    targets_N: Tensor,
    first: int,
    valid: int,
    grad: Tensor,
) -> Tensor:
    """grad * (softmax - onehot(target)) written over what `exp_sum_and_target_` left; 0 for
    negative targets and padding.

    `grad` is the scalar gradient of the sum of losses, `max_N` and `sum_N` are those of all parts.
    """
    own, index = _own_targets(targets_N, first, valid)
    scale_N1 = torch.where(targets_N >= 0, grad.to(sum_N.dtype) / sum_N, 0).unsqueeze(1)
    at_target_N1 = torch.where(own, -grad, 0).to(sum_N.dtype).unsqueeze(1)
    logits_NV[:, valid:] = 0
    for rows in _chunks(logits_NV):
        part = logits_NV[rows]
        if part.dtype == sum_N.dtype:
            part.mul_(scale_N1[rows]).scatter_add_(1, index[rows], at_target_N1[rows])
        else:
            wide = part.to(sum_N.dtype).sub_(max_N[rows, None]).exp_().mul_(scale_N1[rows])
            part.copy_(wide.scatter_add_(1, index[rows], at_target_N1[rows]))
            part[:, valid:] = 0
    return logits_NV


def _own_targets(targets_N: Tensor, first: int, valid: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in this part, and each one's column [N, 1] (0 where it does not)."""
    own = (targets_N >= first) & (targets_N < first + valid)
    return own, torch.where(own, targets_N - first, 0).unsqueeze(1)


def _chunks(logits_NV: Tensor) -> list[slice]:
    """Rows at a time: all, or as many as CHUNK_BYTES hold in float32."""
    rows, columns = logits_NV.shape
    size = max(1, CHUNK_BYTES // (4 * columns)) if logits_NV.element_size() < 4 else max(1, rows)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
