"""GELU (Hendrycks & Gimpel 2016), with the addition of the bias before it.

    h = x + b                                                     where there is one
    y = h Phi(h),         Phi(h) = (1 + erf(h / sqrt(2))) / 2     exact
    y = h sigmoid(2 t),   t = sqrt(2/pi) (h + 0.044715 h^3)       GPT-2's h/2 (1 + tanh(t))

    dh = dy (Phi(h) + h exp(-h^2 / 2) / sqrt(2 pi))               exact
    dh = dy (p + 2 h p (1 - p) dt/dh),    p = sigmoid(2 t)        tanh form
    db = sum over rows of dh

h is computed again in backward. Forward moves 2 numbers for each of y, backward 3, each once.
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
from megapipe.kernels.row_tiles import ELEMENT_WARPS, _element_tile, element_grid, element_tiles

PROGRAMS = 512
"""Programs of the backward pass with a bias, roughly: 64 groups of rows at least, and as many as
make up this number in narrow matrices. Fixed, so that the order of the bias gradient's sum depends
on nothing but the shape."""


def gelu(x: Tensor, *, approximate: bool, backend: Backend | None = None) -> Tensor:
    """Elementwise; `approximate` takes the tanh form. float32 inside.

    Raises UnsupportedError where a Triton kernel is given float64.
    """
    if choose(backend, x) == "triton":
        y: Tensor = torch.ops.megapipe.gelu(x, None, approximate)
        return y
    return F.gelu(x, approximate="tanh" if approximate else "none")


def bias_gelu(
    x: Tensor, bias: Tensor, *, approximate: bool, backend: Backend | None = None
) -> Tensor:
    """gelu(x + bias): x [..., F], bias [F]; errors as `gelu`."""
    if choose(backend, x) == "triton":
        y: Tensor = torch.ops.megapipe.gelu(x, bias, approximate)
        return y
    return F.gelu(x + bias, approximate="tanh" if approximate else "none")


@triton.jit
def _distribution(h, APPROXIMATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(p, h dp/dh) where y = h p(h)."""
    if APPROXIMATE:
        square = h * h
        twice_t = 1.5957691216057308 * h * (1 + 0.044715 * square)
        # The smaller of p and 1 - p is found first: as a difference it would lose what cancels.
        e = tl.exp(-tl.abs(twice_t))
        small = e / (1 + e)
        p = tl.where(twice_t < 0, small, 1 - small)
        slope = small * (1 - small) * 1.5957691216057308 * h * (1 + 3 * 0.044715 * square)
    else:
        p = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        slope = h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    return p, slope


@triton.jit
def _gelu_forward(  # type: ignore[no-untyped-def]
    x,
    bias,
    y,
    rows,
    columns,
    BIAS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile."""
    row, column, inside = _element_tile(rows, columns, ROWS, BLOCK)
    places = row[:, None] * tl.cast(columns, tl.int64) + column[None, :]
    h = tl.load(x + places, inside, other=0).to(tl.float32)
    if BIAS:
        h += tl.load(bias + column, column < columns, other=0).to(tl.float32)[None, :]
    p, _ = _distribution(h, APPROXIMATE)
    tl.store(y + places, (h * p).to(y.dtype.element_ty), inside)


@triton.jit
def _gelu_backward(  # type: ignore[no-untyped-def]
    grad_y,
    x,
    bias,
    grad_x,
    partial,
    rows,
    columns,
    BIAS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns; every so many rows ROWS of them, whose sum goes to one row of `partial`."""
    group, groups = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad_b = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(group * ROWS, rows, groups * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        places = row[:, None] * tl.cast(columns, tl.int64) + column[None, :]
        h = tl.load(x + places, inside, other=0).to(tl.float32)
        if BIAS:
            h += tl.load(bias + column, column < columns, other=0).to(tl.float32)[None, :]
        p, slope = _distribution(h, APPROXIMATE)
        grad = tl.load(grad_y + places, inside, other=0).to(tl.float32) * (p + slope)
        tl.store(grad_x + places, grad.to(grad_x.dtype.element_ty), inside)
        grad_b += grad
    if BIAS:
        start = partial + group.to(tl.int64) * columns
        tl.store(start + column, tl.sum(grad_b, 0), column < columns)


def _backward_grid(rows: int, columns: int, biased: bool) -> tuple[int, int]:
    """(groups of rows, blocks of columns); without a bias to sum for, each tile is a program."""
    tile = element_tiles(columns)
    tiles, blocks = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(columns, tile["BLOCK"])
    return min(tiles, max(64, PROGRAMS // blocks)) if biased else tiles, blocks


@torch.library.custom_op("megapipe::gelu", mutates_args=())
def _forward(x: Tensor, bias: Tensor | None, approximate: bool) -> Tensor:
    check_dtype("gelu", x, bias)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        columns = x.shape[-1]
        rows = x.numel() // columns
        _gelu_forward[element_grid(rows, columns)](
            x.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            rows,
            columns,
            BIAS=bias is not None,
            APPROXIMATE=approximate,
            **element_tiles(columns),
            num_warps=ELEMENT_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return y


@torch.library.custom_op("megapipe::gelu_backward", mutates_args=())
def _backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, approximate: bool
) -> tuple[Tensor, Tensor]:
    """(gradient of x, of the bias or nothing)."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    biased, columns = bias is not None, x.shape[-1]
    rows = x.numel() // max(columns, 1)
    grid = _backward_grid(rows, max(columns, 1), biased)
    partial = x.new_empty((grid[0], columns) if biased else (0, 0), dtype=torch.float32)
    if x.numel():
        _gelu_backward[grid](
            grad_y.contiguous(),
            x.contiguous(),
            None if bias is None else bias.contiguous(),
            grad_x,
            partial,
            rows,
            columns,
            BIAS=biased,
            APPROXIMATE=approximate,
            **element_tiles(columns),
            num_warps=ELEMENT_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return grad_x, row_sums(partial).to(x.dtype if bias is None else bias.dtype)


@_forward.register_fake
def _(x: Tensor, bias: Tensor | None, approximate: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(grad_y: Tensor, x: Tensor, bias: Tensor | None, approximate: bool) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, x.new_empty(0) if bias is None else torch.empty_like(bias)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _backward(grad_y, x, bias, ctx.approximate)
    return grad_x, None if bias is None else grad_bias, None


_forward.register_autograd(_differentiate, setup_context=_set_up)


def variants() -> Iterator[Variant]:
    """With the bias: both forms in bfloat16, the exact one also in narrow rows of float32."""
    for columns, dtype, approximate in (
        (16384, "bf16", True),
        (16384, "bf16", False),
        (512, "fp32", False),
    ):
        label = f"bias, {'tanh' if approximate else 'exact'}, {columns} columns, {dtype}"
        sizes = {"partial": "*fp32", "rows": "i32", "columns": "i32"}
        for kernel, tensors in (
            (_gelu_forward, ("x", "bias", "y")),
            (_gelu_backward, ("grad_y", "x", "bias", "grad_x")),
        ):
            signature = dict.fromkeys(tensors, f"*{dtype}") | sizes
            if kernel is _gelu_forward:
                del signature["partial"]
            yield Variant(
                kernel,
                label,
                signature=signature,
                constants={"BIAS": True, "APPROXIMATE": approximate} | element_tiles(columns),
                num_warps=ELEMENT_WARPS,
                divisible=("columns",),
            )
