"""Dropout (Srivastava et al. 2014) whose bits depend on no layout, with a residual's addition.

    y = residual + x keep / (1 - p)
    dx = dy keep / (1 - p)

Whether an element is kept is a function of (key, global sample, position, feature), or of (key,
sample, head, query, key position) for attention probabilities. Nothing is kept for backward but
the samples' numbers: a kernel makes its part of the mask again. Forward moves 2 numbers for each
of y (3 with a residual), backward 2, each once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapipe.kernels.backend import FP_FUSION, Backend, check_dtype, choose
from megapipe.kernels.compilation import Variant
from megapipe.kernels.random import _hash32, _hash64, hash32, hash64
from megapipe.kernels.row_tiles import ELEMENT_WARPS, _element_tile, element_grid, element_tiles


def dropout(
    x_SBH: Tensor,
    p: float,
    key: int,
    samples_B: Tensor,
    first_position: int,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """[S, B, H] -> [S, B, H]; row s is at position `first_position` + s of the sequence.

    Both backends keep the same elements. Raises UnsupportedError where a Triton kernel is given
    float64.
    """
    if choose(backend, x_SBH) == "triton":
        y_SBH: Tensor = torch.ops.megapipe.dropout(x_SBH, None, p, key, samples_B, first_position)
        return y_SBH
    keep = keep_mask(p, key, samples_B, x_SBH.shape[0], x_SBH.shape[2], first_position)
    return x_SBH.masked_fill(~keep, 0) * (1 / (1 - p))


def dropout_add(
    x_SBH: Tensor,
    residual_SBH: Tensor,
    p: float,
    key: int,
    samples_B: Tensor,
    first_position: int,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """residual + dropout(x)."""
    if choose(backend, x_SBH) == "triton":
        y_SBH: Tensor = torch.ops.megapipe.dropout(
            x_SBH, residual_SBH, p, key, samples_B, first_position
        )
        return y_SBH
    return residual_SBH + dropout(x_SBH, p, key, samples_B, first_position, backend="torch")


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
    return hash32(rows, width) <= last_kept(p)


def last_kept(p: float) -> int:
    """An element is kept if its hash32 is at most this; -1 to 2^31 - 1, which an int32 holds."""
    return round((1 - p) * 2**31) - 1


@triton.jit(do_not_specialize=["key", "first_position", "last_kept"])
def _dropout(  # type: ignore[no-untyped-def]
    x,
    residual,
    y,
    samples,
    key,
    first_position,
    last_kept,
    scale,
    rows,
    batch,
    hidden,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of [rows, hidden] = [S * batch, hidden]."""
    row, column, inside = _element_tile(rows, hidden, ROWS, BLOCK)
    sample = tl.load(samples + row % batch, row < rows, other=0)
    position = tl.cast(first_position, tl.uint64) + (row // batch).to(tl.uint64)
    row_key = _hash64(key, _hash64(key, sample) + position)
    keep = _hash32(row_key[:, None], column[None, :]) <= last_kept
    places = row[:, None] * tl.cast(hidden, tl.int64) + column[None, :]
    out = tl.where(keep, tl.load(x + places, inside, other=0).to(tl.float32) * scale, 0)
    if ADD:
        out += tl.load(residual + places, inside, other=0).to(tl.float32)
    tl.store(y + places, out.to(y.dtype.element_ty), inside)


@torch.library.custom_op("megapipe::dropout", mutates_args=())
def _forward(
    x_SBH: Tensor,
    residual_SBH: Tensor | None,
    p: float,
    key: int,
    samples_B: Tensor,
    first_position: int,
) -> Tensor:
    check_dtype("dropout", x_SBH, residual_SBH)
    length, batch, hidden = x_SBH.shape
    assert samples_B.shape == (batch,), (samples_B.shape, x_SBH.shape)
    y_SBH = torch.empty_like(x_SBH, memory_format=torch.contiguous_format)
    if x_SBH.numel():
        rows = length * batch
        _dropout[element_grid(rows, hidden)](
            x_SBH.contiguous(),
            None if residual_SBH is None else residual_SBH.contiguous(),
            y_SBH,
            samples_B.contiguous(),
            key,
            first_position,
            last_kept(p),
            1 / (1 - p),
            rows,
            batch,
            hidden,
            ADD=residual_SBH is not None,
            **element_tiles(hidden),
            num_warps=ELEMENT_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return y_SBH


@_forward.register_fake
def _(
    x_SBH: Tensor,
    residual_SBH: Tensor | None,
    p: float,
    key: int,
    samples_B: Tensor,
    first_position: int,
) -> Tensor:
    return torch.empty_like(x_SBH, memory_format=torch.contiguous_format)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, residual_SBH, ctx.p, ctx.key, samples_B, ctx.first_position = inputs
    ctx.added = residual_SBH is not None
    ctx.save_for_backward(samples_B)


def _differentiate(ctx: Any, grad_SBH: Tensor) -> tuple[Tensor | None, ...]:
    (samples_B,) = ctx.saved_tensors
    grad_x_SBH = _forward(grad_SBH, None, ctx.p, ctx.key, samples_B, ctx.first_position)
    return grad_x_SBH, grad_SBH if ctx.added else None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_set_up)


def variants() -> Iterator[Variant]:
    """Wide rows, and narrow ones of which a program has several."""
    for hidden, dtype, add in ((4096, "bf16", True), (4096, "bf16", False), (64, "fp32", True)):
        yield Variant(
            _dropout,
            f"{'added, ' if add else ''}hidden {hidden}, {dtype}",
            signature=dict.fromkeys(("x", "residual", "y"), f"*{dtype}")
            | {"samples": "*i64", "key": "i64", "scale": "fp32"}
            | dict.fromkeys(("first_position", "last_kept", "rows", "batch", "hidden"), "i32"),
            constants={"ADD": add} | element_tiles(hidden),
            num_warps=ELEMENT_WARPS,
            divisible=("hidden",),
        )
