"""SwiGLU (Shazeer 2020): the gate and its projection come from one matmul.

    y = silu(g) u,    silu(g) = g sigmoid(g),    [g, u] the halves of the last dimension

    du = dy silu(g)
    dg = dy u sigmoid(g) (1 + g (1 - sigmoid(g)))

Forward moves 3 numbers for each of y, backward 5 (sigmoid(g) is computed again, not kept), each
once: 6 and 10 bytes in bfloat16.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megapipe.kernels.backend import FP_FUSION, Backend, check_dtype, choose
from megapipe.kernels.compilation import Variant
from megapipe.kernels.row_tiles import ELEMENT_WARPS, _element_tile, element_grid, element_tiles


def swiglu(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[..., 2 F] -> [..., F] in x's dtype.

    Raises UnsupportedError where a Triton kernel is given float64.
    """
    if choose(backend, x) == "triton":
        y: Tensor = torch.ops.megapipe.swiglu(x)
    else:
        y = _Reference.apply(x)
    return y


class _Reference(torch.autograd.Function):
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


@triton.jit
def _swiglu_forward(x, y, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of y [rows, width]."""
    row, column, inside = _element_tile(rows, width, ROWS, BLOCK)
    places = row[:, None] * tl.cast(width, tl.int64) + column[None, :]
    gates = x + row[:, None] * tl.cast(width, tl.int64) * 2 + column[None, :]
    gate = tl.load(gates, inside, other=0).to(tl.float32)
    up = tl.load(gates + width, inside, other=0).to(tl.float32)
    tl.store(y + places, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(  # type: ignore[no-untyped-def]
    grad_y, x, grad_x, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of dy [rows, width]: both halves of dx."""
    row, column, inside = _element_tile(rows, width, ROWS, BLOCK)
    start = row[:, None] * tl.cast(width, tl.int64)
    grad = tl.load(grad_y + start + column[None, :], inside, other=0).to(tl.float32)
    places = start * 2 + column[None, :]
    gate = tl.load(x + places, inside, other=0).to(tl.float32)
    up = tl.load(x + places + width, inside, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad * gate * sigmoid
    tl.store(grad_x + places, grad_gate.to(grad_x.dtype.element_ty), inside)
    tl.store(grad_x + places + width, grad_up.to(grad_x.dtype.element_ty), inside)


@torch.library.custom_op("megapipe::swiglu", mutates_args=())
def _forward(x: Tensor) -> Tensor:
    check_dtype("swiglu", x)
    y = _half(x)
    width = y.shape[-1]
    if y.numel():
        rows = y.numel() // width
        _swiglu_forward[element_grid(rows, width)](
            x.contiguous(),
            y,
            rows,
            width,
            **element_tiles(width),
            num_warps=ELEMENT_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return y


@torch.library.custom_op("megapipe::swiglu_backward", mutates_args=())
def _backward(grad_y: Tensor, x: Tensor) -> Tensor:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = grad_y.shape[-1]
    if grad_y.numel():
        rows = grad_y.numel() // width
        _swiglu_backward[element_grid(rows, width)](
            grad_y.contiguous(),
            x.contiguous(),
            grad_x,
            rows,
            width,
            **element_tiles(width),
            num_warps=ELEMENT_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return grad_x


def _half(x: Tensor) -> Tensor:
    """Empty, of y's shape."""
    assert x.shape[-1] % 2 == 0, x.shape
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_forward.register_fake
def _(x: Tensor) -> Tensor:
    return _half(x)


@_backward.register_fake
def _(grad_y: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx: Any, grad_y: Tensor) -> Tensor:
    grad_x: Tensor = _backward(grad_y, ctx.saved_tensors[0])
    return grad_x


_forward.register_autograd(_differentiate, setup_context=_set_up)


def variants() -> Iterator[Variant]:
    """Wide rows, and narrow ones of which a program has several."""
    for width, dtype in ((14336, "bf16"), (512, "fp32")):
        pointer, sizes = f"*{dtype}", {"rows": "i32", "width": "i32"}
        for kernel, tensors in (
            (_swiglu_forward, ("x", "y")),
            (_swiglu_backward, ("grad_y", "x", "grad_x")),
        ):
            yield Variant(
                kernel,
                f"width {width}, {dtype}",
                signature=dict.fromkeys(tensors, pointer) | sizes,
                constants=element_tiles(width),
                num_warps=ELEMENT_WARPS,
                divisible=("width",),
            )
