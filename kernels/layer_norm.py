"""LayerNorm (Ba et al. 2016), with the addition of the residual stream before it.

    s = x + residual                        where there is one
    n = (s - mean(s)) r,    r = (var(s) + epsilon)^(-1/2)       over the last dimension, per row
    y = w n + b

    db = sum over rows of dy,    dw = sum over rows of dy n
    ds = r (w dy - mean(w dy) - n mean(w dy n)) + what flows back into s itself

Kept for backward are s, and mean and r of each row. Forward moves 2 numbers for each of y (4 with a
residual), backward 3 (4), each once.
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
from megapipe.kernels.row_sums import row_sums
from megapipe.kernels.row_tiles import RowTiles, _with_residual, row_tiles


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, *, backend: Backend | None = None
) -> Tensor:
    """x [..., H], weight [H] and bias [H] -> [..., H] in x's dtype; float32 inside.

    Raises UnsupportedError where a Triton kernel is asked for more than it takes: H above 16,384,
    float64.
    """
    if choose(backend, x) == "triton":
        y: Tensor = torch.ops.megapipe.layer_norm(x, None, weight, bias, epsilon)[0]
        return y
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), each [..., H]; errors as `layer_norm`."""
    if choose(backend, x) == "triton":
        y, total, _, _ = torch.ops.megapipe.layer_norm(x, residual, weight, bias, epsilon)
        return y, total
    total = residual + x
    return F.layer_norm(total, weight.shape, weight, bias, epsilon), total


@triton.jit
def _layer_norm_forward(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    bias,
    y,
    total,
    means,
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
    mean = tl.sum(s, 1) / hidden
    # The variance of what is left, not mean(s^2) - mean^2, which cancels.
    s = tl.where(inside, s - mean[:, None], 0)
    r = tl.rsqrt(tl.sum(s * s, 1) / hidden + epsilon)
    tl.store(means + row, mean, row < rows)
    tl.store(scale + row, r, row < rows)
    w = tl.load(weight + column, column < hidden, other=0).to(tl.float32)
    b = tl.load(bias + column, column < hidden, other=0).to(tl.float32)
    normed = s * r[:, None] * w[None, :] + b[None, :]
    tl.store(y + places, normed.to(y.dtype.element_ty), inside)


@triton.jit
def _normed_and_gradients(  # type: ignore[no-untyped-def]
    grad_y, s, weight, mean, r, row, column, rows, hidden
):
    """(n, dy, w dy) in some columns of some rows; dy is 0 outside the matrix."""
    inside = (row < rows)[:, None] & (column < hidden)[None, :]
    places = row[:, None] * tl.cast(hidden, tl.int64) + column[None, :]
    wide = tl.load(s + places, inside, other=0).to(tl.float32)
    normed = (wide - mean[:, None]) * r[:, None]
    grad = tl.load(grad_y + places, inside, other=0).to(tl.float32)
    # Read for each row, from the cache: held over the loop it costs too many registers.
    w = tl.load(weight + column, column < hidden, other=0).to(tl.float32)
    return normed, grad, grad * w[None, :]


@triton.jit
def _layer_norm_backward(  # type: ignore[no-untyped-def]
    grad_y,
    grad_total,
    s,
    weight,
    means,
    scale,
    grad_s,
    partial_w,
    partial_b,
    rows,
    hidden,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """As _rms_norm_backward of rms_norm.py, with two sums over rows and two means over columns."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grad_w = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_b = tl.zeros((ROWS, BLOCK), tl.float32)
    share = 1.0 / hidden
    for first in range(group * ROWS, rows, groups * ROWS):
        row = first + tl.arange(0, ROWS)
        mean = tl.load(means + row, row < rows, other=0)
        r = tl.load(scale + row, row < rows, other=0)
        dot = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for part in range(1, PARTS):
            other = (tl.program_id(0) + part) % PARTS * BLOCK + tl.arange(0, BLOCK)
            normed, _, grad = _normed_and_gradients(
                grad_y, s, weight, mean, r, row, other, rows, hidden
            )
            dot += tl.sum(grad * normed, 1)
            total += tl.sum(grad, 1)
        normed, grad, wide = _normed_and_gradients(
            grad_y, s, weight, mean, r, row, column, rows, hidden
        )
        grad_w += grad * normed
        grad_b += grad
        dot += tl.sum(wide * normed, 1)
        total += tl.sum(wide, 1)
        grad = wide - (total * share)[:, None] - normed * (dot * share)[:, None]
        grad *= r[:, None]
        inside = (row < rows)[:, None] & (column < hidden)[None, :]
        places = row[:, None] * tl.cast(hidden, tl.int64) + column[None, :]
        if ADD:
            grad += tl.load(grad_total + places, inside, other=0).to(tl.float32)
        tl.store(grad_s + places, grad.to(grad_s.dtype.element_ty), inside)
    start = group.to(tl.int64) * hidden + column
    tl.store(partial_w + start, tl.sum(grad_w, 0), column < hidden)
    tl.store(partial_b + start, tl.sum(grad_b, 0), column < hidden)


def _tiles(hidden: int, dtype: torch.dtype) -> RowTiles:
    return row_tiles("layer_norm", hidden, 4096 if dtype == torch.float32 else 8192)


@torch.library.custom_op("megapipe::layer_norm", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, x + residual or nothing, mean [rows], r [rows]); the last two in float32."""
    check_dtype("layer_norm", x, residual, weight, bias)
    hidden = x.shape[-1]
    tiles = _tiles(hidden, x.dtype)
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    mean = torch.empty_like(scale)
    if x.numel():
        rows = scale.numel()
        _layer_norm_forward[tiles.forward_grid(rows)](
            x,
            None if residual is None else residual.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            y,
            total,
            mean,
            scale,
            epsilon,
            rows,
            hidden,
            ADD=residual is not None,
            **tiles.forward(),
            num_warps=tiles.forward_warps,
            enable_fp_fusion=FP_FUSION,
        )
    return y, total, mean, scale


@torch.library.custom_op("megapipe::layer_norm_backward", mutates_args=())
def _backward(
    grad_y: Tensor, grad_total: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of s, of weight, of bias)."""
    hidden = s.shape[-1]
    tiles = _tiles(hidden, s.dtype)
    rows = r.numel()
    grid = tiles.backward_grid(rows)
    grad_s = torch.empty_like(s, memory_format=torch.contiguous_format)
    partial = s.new_empty((2, grid[1], hidden), dtype=torch.float32)
    if s.numel():
        _layer_norm_backward[grid](
            grad_y.contiguous(),
            None if grad_total is None else grad_total.contiguous(),
            s.contiguous(),
            weight.contiguous(),
            mean,
            r,
            grad_s,
            partial[0],
            partial[1],
            rows,
            hidden,
            ADD=grad_total is not None,
            **tiles.backward(),
            num_warps=tiles.backward_warps,
            enable_fp_fusion=FP_FUSION,
        )
    return grad_s, row_sums(partial[0]).to(weight.dtype), row_sums(partial[1]).to(weight.dtype)


@_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return y, total, scale, torch.empty_like(scale)


@_backward.register_fake
def _(
    grad_y: Tensor, grad_total: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_s = torch.empty_like(s, memory_format=torch.contiguous_format)
    return grad_s, torch.empty_like(weight), torch.empty_like(weight)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, _ = inputs
    _, total, mean, scale = output
    ctx.added = residual is not None
    ctx.mark_non_differentiable(mean, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.added else x, weight, mean, scale)


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, *nothing: None
) -> tuple[Tensor | None, ...]:
    s, weight, mean, scale = ctx.saved_tensors
    if grad_y is None:
        return grad_total, grad_total, None, None, None
    added = grad_total if ctx.added else None
    grad_s, grad_weight, grad_bias = _backward(grad_y, added, s, weight, mean, scale)
    return grad_s, grad_s if ctx.added else None, grad_weight, grad_bias, None


_forward.register_autograd(_differentiate, setup_context=_set_up)


def variants() -> Iterator[Variant]:
    """bfloat16, and float32 where registers are scarcest."""
    for hidden, dtype in (
        (1024, "bf16"),
        (8192, "bf16"),
        (16384, "bf16"),
        (16384, "fp32"),
    ):
        tiles = _tiles(hidden, torch.float32 if dtype == "fp32" else torch.bfloat16)
        narrow, label = f"*{dtype}", f"added, hidden {hidden}, {dtype}"
        statistics = {"means": "*fp32", "scale": "*fp32", "rows": "i32", "hidden": "i32"}
        yield Variant(
            _layer_norm_forward,
            label,
            signature=dict.fromkeys(("x", "residual", "weight", "bias", "y", "total"), narrow)
            | statistics
            | {"epsilon": "fp32"},
            constants={"ADD": True} | tiles.forward(),
            num_warps=tiles.forward_warps,
            divisible=("hidden",),
        )
        yield Variant(
            _layer_norm_backward,
            label,
            signature=dict.fromkeys(("grad_y", "grad_total", "s", "weight", "grad_s"), narrow)
            | statistics
            | {"partial_w": "*fp32", "partial_b": "*fp32"},
            constants={"ADD": True} | tiles.backward(),
            num_warps=tiles.backward_warps,
            divisible=("hidden",),
        )
