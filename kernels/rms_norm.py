"""RMSNorm (Zhang & Sennrich 2019).

r = (mean(x^2) + epsilon)^(-1/2)        over the last dimension, per row
y = w x r

dw = sum over rows of dy x r
dx = r (w dy - x r^2 mean(w dy x))
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """[..., H] and weight [H] -> [..., H] in x's dtype; float32 (float64 for float64) inside."""
    y: Tensor = _RMSNorm.apply(x, weight, epsilon)
    return y


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number per row; the torch composition would save three tensors like x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide, grad = _wide(x), _wide(grads[0])
        normed = wide * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_normed = grad * weight
        mean = torch.linalg.vecdot(grad_normed, normed).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = grad_normed.addcmul_(normed, mean, value=-1).mul_(scale)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
