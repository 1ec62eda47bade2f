"""RMSNorm (Zhang & Sennrich 2019), with the addition of the residual stream before it.

    s = x + residual                        where there is one
    r = (mean(s^2) + epsilon)^(-1/2)        over the last dimension, per row
    y = w s r

    dw = sum over rows of dy s r
    ds = r (w dy - s r^2 mean(w dy s)) + what flows back into s itself

Kept for backward are s and r of each row. Forward moves 2 numbers for each of y (4 with a
residual), backward 3 (4), each once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapipe.kernels.backend import FP_FUSION, Backend, check_dtype, choose
from megapipe.kernels.compilation import Variant
from megapipe.kernels.row_sums import row_sums
from megapipe.kernels.row_tiles import _with_residual, row_tiles

HELD = 8192


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, backend: Backend | None = None
) -> Tensor:
    """x [..., H] and weight [H] -> [..., H] in x's dtype; float32 (float64 for float64) inside.

    Raises UnsupportedError where a Triton kernel is asked for more than it takes: H above 16,384,
    float64.
    """
    if choose(backend, x) == "triton":
        y: Tensor = torch.ops.megapipe.rms_norm(x, None, weight, epsilon)[0]
    else:
        y = _Reference.apply(x, weight, epsilon)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), each [..., H]; errors as `rms_norm`."""
    if choose(backend, x) == "triton":
        y, total, _ = torch.ops.megapipe.rms_norm(x, residual, weight, epsilon)
        return y, total
    total = residual + x
    return _Reference.apply(total, weight, epsilon), total


class _Reference(torch.autograd.Function):
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


@triton.jit
def _rms_norm_forward(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    y,
    total,
    scale,
    epsilon,
    rows,
    hidden,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < hidden)[None, :]
    places = row[:, None].to(tl.int64) * hidden + column[None, :]
    s = _with_residual(x, residual, total, places, inside, ADD)
    r = tl.rsqrt(tl.sum(s * s, 1) / hidden + epsilon)
    tl.store(scale + row, r, row < rows)
    w = tl.load(weight + column, column < hidden, other=0).to(tl.float32)
    tl.store(y + places, (s * r[:, None] * w[None, :]).to(y.dtype.element_ty), inside)


@triton.jit
def _normed_and_gradients(  # type: ignore[no-untyped-def]
    grad_y, s, weight, r, row, column, rows, hidden
):
    """(s r, dy, w dy) in some columns of some rows."""
    inside = (row < rows)[:, None] & (column < hidden)[None, :]
    places = row[:, None] * tl.cast(hidden, tl.int64) + column[None, :]
    normed = tl.load(s + places, inside, other=0).to(tl.float32) * r[:, None]
    grad = tl.load(grad_y + places, inside, other=0).to(tl.float32)
    # Read for each row, from the cache: held over the loop it costs too many registers.
    w = tl.load(weight + column, column < hidden, other=0).to(tl.float32)
    return normed, grad, grad * w[None, :]


@triton.jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    grad_y,
    grad_total,
    s,
    weight,
    scale,
    grad_s,
    partial,
    rows,
    hidden,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Every so many rows ROWS of them; their weight gradients go to one row of `partial`.

    Where the registers would not suffice for a whole row and its sums, PARTS programs have BLOCK
    columns each. Each needs the others' terms of the mean, and reads what gives them from the
    cache, where the others have brought it.
    """
    group, groups = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grad_w = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(group * ROWS, rows, groups * ROWS):
        row = first + tl.arange(0, ROWS)
        r = tl.load(scale + row, row < rows, other=0)
        dot = tl.zeros((ROWS,), tl.float32)
        for part in range(1, PARTS):
            other = (tl.program_id(0) + part) % PARTS * BLOCK + tl.arange(0, BLOCK)
            normed, _, grad = _normed_and_gradients(grad_y, s, weight, r, row, other, rows, hidden)
            dot += tl.sum(grad * normed, 1)
        normed, grad, wide = _normed_and_gradients(grad_y, s, weight, r, row, column, rows, hidden)
        grad_w += grad * normed
        mean = (dot + tl.sum(wide * normed, 1)) / hidden
        grad = (wide - normed * mean[:, None]) * r[:, None]
        inside = (row < rows)[:, None] & (column < hidden)[None, :]
        places = row[:, None] * tl.cast(hidden, tl.int64) + column[None, :]
        if ADD:
            grad += tl.load(grad_total + places, inside, other=0).to(tl.float32)
        tl.store(grad_s + places, grad.to(grad_s.dtype.element_ty), inside)
    start = partial + group.to(tl.int64) * hidden
    tl.store(start + column, tl.sum(grad_w, 0), column < hidden)


@torch.library.custom_op("megapipe::rms_norm", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual or nothing, r [rows] float32)."""
    check_dtype("rms_norm", x, residual, weight)
    hidden = x.shape[-1]
    tiles = row_tiles("rms_norm", hidden, HELD)
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    if x.numel():
        rows = scale.numel()
        _rms_norm_forward[tiles.forward_grid(rows)](
            x,
            None if residual is None else residual.contiguous(),
            weight.contiguous(),
            y,
            total,
            scale,
            epsilon,
            rows,
            hidden,
            ADD=residual is not None,
            **tiles.forward(),
            num_warps=tiles.forward_warps,
            enable_fp_fusion=FP_FUSION,
        )
    return y, total, scale


@torch.library.custom_op("megapipe::rms_norm_backward", mutates_args=())
def _backward(
    grad_y: Tensor, grad_total: Tensor | None, s: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of s, gradient of weight)."""
    hidden = s.shape[-1]
    tiles = row_tiles("rms_norm", hidden, HELD)
    rows = scale.numel()
    grid = tiles.backward_grid(rows)
    grad_s = torch.empty_like(s, memory_format=torch.contiguous_format)
    partial = s.new_empty((grid[1], hidden), dtype=torch.float32)
    if s.numel():
        _rms_norm_backward[grid](
            grad_y.contiguous(),
            None if grad_total is None else grad_total.contiguous(),
            s.contiguous(),
            weight.contiguous(),
            scale,
            grad_s,
            partial,
            rows,
            hidden,
            ADD=grad_total is not None,
            **tiles.backward(),
            num_warps=tiles.backward_warps,
            enable_fp_fusion=FP_FUSION,
        )
    return grad_s, row_sums(partial).to(weight.dtype)


@_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@_backward.register_fake
def _(
    grad_y: Tensor, grad_total: Tensor | None, s: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(s, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _ = inputs
    _, total, scale = output
    ctx.added = residual is not None
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.added else x, weight, scale)


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, grad_scale: None
) -> tuple[Tensor | None, ...]:
    s, weight, scale = ctx.saved_tensors
    if grad_y is None:
        return grad_total, grad_total, None, None
    grad_s, grad_weight = _backward(grad_y, grad_total if ctx.added else None, s, weight, scale)
    return grad_s, grad_s if ctx.added else None, grad_weight, None


_forward.register_autograd(_differentiate, setup_context=_set_up)


def variants() -> Iterator[Variant]:
    """bfloat16, and float32 where registers are scarcest."""
    for hidden, dtype in ((128, "bf16"), (4096, "bf16"), (16384, "bf16"), (16384, "fp32")):
        tiles = row_tiles("rms_norm", hidden, HELD)
        narrow, label = f"*{dtype}", f"added, hidden {hidden}, {dtype}"
        yield Variant(
            _rms_norm_forward,
            label,
            signature=dict.fromkeys(("x", "residual", "weight", "y", "total"), narrow)
            | {"scale": "*fp32", "epsilon": "fp32", "rows": "i32", "hidden": "i32"},
            constants={"ADD": True} | tiles.forward(),
            num_warps=tiles.forward_warps,
            divisible=("hidden",),
        )
        yield Variant(
            _rms_norm_backward,
            label,
            signature=dict.fromkeys(("grad_y", "grad_total", "s", "weight", "grad_s"), narrow)
            | {"scale": "*fp32", "partial": "*fp32", "rows": "i32", "hidden": "i32"},
            constants={"ADD": True} | tiles.backward(),
            num_warps=tiles.backward_warps,
            divisible=("hidden",),
        )
