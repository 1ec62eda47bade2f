"""Dropout (Srivastava et al. 2014) whose bits depend on no layout.

Whether an element is kept is a function of (key, global sample, position, feature), or of (key,
sample, head, query, key position) for attention probabilities. Kept elements are divided by 1 - p.
"""

import torch
from torch import Tensor

from megapipe.kernels.random import hash32, hash64


def dropout(x_SBH: Tensor, p: float, key: int, samples_B: Tensor, first_position: int) -> Tensor:
    """[S, B, H] -> [S, B, H]; row s is at position `first_position` + s of the sequence."""
    keep = keep_mask(p, key, samples_B, x_SBH.shape[0], x_SBH.shape[2], first_position)
    return x_SBH.masked_fill(~keep, 0) * (1 / (1 - p))


def dropout_add(
    x_SBH: Tensor,
    residual_SBH: Tensor,
    p: float,
    key: int,
    samples_B: Tensor,
    first_position: int,
) -> Tensor:
    """residual + dropout(x)."""
    return residual_SBH + dropout(x_SBH, p, key, samples_B, first_position)


def keep_mask(
    p: float, key: int, samples_B: Tensor, length: int, width: int, first_position: int
) -> Tensor:
    """[length, B, width] bool, True with probability 1 - p."""
    positions = torch.arange(length, device=samples_B.device) + first_position
    rows_SB = hash64(key, hash64(key, samples_B) + positions[:, None])
    return _kept(rows_SB, width, p)


def attention_dropout_mask(
    p: float, key: int, samples_B: Tensor, *, heads: range, length: int
) -> Tensor:
    """[B, len(heads), length, length] bool, True where a probability is kept."""
    device = samples_B.device
    head_N = torch.arange(heads.start, heads.stop, device=device)
    query_S = torch.arange(length, device=device)
    rows_BN = hash64(key, hash64(key, samples_B)[:, None] + head_N)
    rows_BNS = hash64(key, rows_BN[:, :, None] + query_S)
    return _kept(rows_BNS, length, p)


def _kept(rows: Tensor, width: int, p: float) -> Tensor:
    return hash32(rows, width) < round((1 - p) * 2**31)
