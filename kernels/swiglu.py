"""SwiGLU (Shazeer 2020): the gate and its projection come from one matmul.

y = silu(g) u,    silu(g) = g sigmoid(g),    [g, u] the halves of the last dimension

du = dy silu(g)
dg = dy u sigmoid(g) (1 + g (1 - sigmoid(g)))
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F] -> [..., F]."""
    y: Tensor = _SwiGLU.apply(x)
    return y


class _SwiGLU(torch.autograd.Function):
    """Saves its input only: silu(g) is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grad_x
