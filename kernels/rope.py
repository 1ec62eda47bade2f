"""Rotary position embedding (Su et al. 2021), in the halves layout of Llama's released weights.

    [a, b] = halves of a head;  y = [a cos - b sin, b cos + a sin],  angle = position * frequency

The gradient is the rotation by the opposite angle.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """Llama 3's stretch of low frequencies for longer contexts (Grattafiori et al. 2024)."""

    @property
    def factor(self) -> float: ...
    @property
    def low_frequency_factor(self) -> float: ...
    @property
    def high_frequency_factor(self) -> float: ...
    @property
    def original_max_sequence_length(self) -> int: ...


def rope_frequencies(head_dim: int, theta: float, scaling: Scaling | None) -> Tensor:
    """[head_dim / 2] float64: radians per position, theta^(-2 i / head_dim), scaled if asked."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies
    # Wavelengths beyond `low` are stretched by the factor, those below `high` left, others between.
    turns = scaling.original_max_sequence_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [S, B, N, D] and k [S, B, K, D] turned by the angles whose cos and sin are [S, D / 2]."""
    turned_q: Tensor = _Rope.apply(q, cos, sin)
    turned_k: Tensor = _Rope.apply(k, cos, sin)
    return turned_q, turned_k


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        # In memory [B, N, S, D]: attention then reads the positions of a head one after the other
        # (float32 on a CPU: 10% less time in it than with [S, B, N, D]).
        positions, batch, heads, width = x.shape
        out = torch.empty(batch, heads, positions, width, dtype=x.dtype, device=x.device)
        return _turn(x, cos, sin, out.permute(2, 0, 1, 3))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (grad,) = grads
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        return _turn(grad, cos, -sin, out), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """x [S, B, N, D] turned, written to `out`."""
    cos, sin = cos[:, None, None], sin[:, None, None]
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out
