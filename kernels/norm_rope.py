"""QK-norm and rotary positions together (as in Qwen 3): each head is normed, then turned.

    z = w x r,    r = (mean(x^2) + epsilon)^(-1/2) over a head;    y = z turned by its position

    dz = dy turned back;    dw = sum over tokens and heads of dz x r
    dx = r (w dz - x r^2 mean(w dz x))

The backward pass starts from x, so nothing is done in place and nothing but x is kept; r is found
again. One read and one write of queries and keys each way.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapipe.kernels.backend import FP_FUSION, Backend, check_dtype, choose
from megapipe.kernels.compilation import Variant
from megapipe.kernels.rms_norm import rms_norm
from megapipe.kernels.rope import WARPS, _angles, _far, _halves, check_heads, head_tile, rope
from megapipe.kernels.row_sums import row_sums

PROGRAMS = 512
"""Of the backward pass: each adds up the weight gradients of its tokens, in order."""


def norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    epsilon: float,
    *,
    positions_SB: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """q [S, B, N, D] and k [S, B, K, D], normed by weights [D] and turned, as new tensors.

    Angles and errors as in `rope`.
    """
    if choose(backend, q) == "triton":
        y_q, y_k = torch.ops.megapipe.norm_rope(
            q, k, q_weight, k_weight, cos, sin, positions_SB, epsilon
        )
        return y_q, y_k
    q = rms_norm(q, q_weight, epsilon, backend="torch")
    k = rms_norm(k, k_weight, epsilon, backend="torch")
    return rope(q, k, cos, sin, positions_SB=positions_SB, backend="torch")


@triton.jit
def _scale(a, b, width, epsilon):  # type: ignore[no-untyped-def]
    """r of some heads, [heads, 1], from their halves."""
    squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
    return tl.rsqrt(squares / width + epsilon)[:, None]


@triton.jit
def _heads_forward(  # type: ignore[no-untyped-def]
    x,
    y,
    weight,
    c,
    s,
    x_head,
    heads,
    half,
    epsilon,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """All heads of one token; c and s are [1, HALF], y is contiguous."""
    column = tl.arange(0, HALF)[None, :]
    w_a, w_b = _halves(weight, column, column < half, half)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (column < half)
        a, b = _halves(x + _far(head, x_head), column, inside, half)
        r = _scale(a, b, 2 * half, epsilon)
        a = a * r * w_a
        b = b * r * w_b
        places = y + head * (2 * half) + column
        tl.store(places, (a * c - b * s).to(y.dtype.element_ty), inside)
        tl.store(places + half, (b * c + a * s).to(y.dtype.element_ty), inside)


@triton.jit
def _heads_backward(  # type: ignore[no-untyped-def]
    x,
    grad_y,
    grad_x,
    weight,
    c,
    s,
    x_head,
    heads,
    half,
    epsilon,
    grad_w_a,
    grad_w_b,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """All heads of one token; returns the weight's gradients so far, [HALF] each. The gradients of
    x and y are contiguous."""
    column = tl.arange(0, HALF)[None, :]
    w_a, w_b = _halves(weight, column, column < half, half)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (column < half)
        a, b = _halves(x + _far(head, x_head), column, inside, half)
        r = _scale(a, b, 2 * half, epsilon)
        a *= r
        b *= r
        g_a, g_b = _halves(grad_y + head * (2 * half), column, inside, half)
        d_a = g_a * c + g_b * s
        d_b = g_b * c - g_a * s
        grad_w_a += tl.sum(d_a * a, 0)
        grad_w_b += tl.sum(d_b * b, 0)
        d_a *= w_a
        d_b *= w_b
        mean = ((tl.sum(d_a * a, 1) + tl.sum(d_b * b, 1)) / (2 * half))[:, None]
        places = grad_x + head * (2 * half) + column
        tl.store(places, ((d_a - a * mean) * r).to(grad_x.dtype.element_ty), inside)
        tl.store(places + half, ((d_b - b * mean) * r).to(grad_x.dtype.element_ty), inside)
    return grad_w_a, grad_w_b


@triton.jit
def _norm_rope_forward(  # type: ignore[no-untyped-def]
    q,
    k,
    q_weight,
    k_weight,
    y_q,
    y_k,
    cos,
    sin,
    positions,
    epsilon,
    batch,
    half,
    heads,
    kv_heads,
    q_s,
    q_b,
    q_h,
    k_s,
    k_b,
    k_h,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One token. The outputs are contiguous."""
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    c, d = _angles(cos, sin, positions, token, s, half, POSITIONS, HALF)
    width = 2 * half
    _heads_forward(
        q + s * q_s + b * q_b, y_q + token * heads * width, q_weight, c, d, q_h, heads, half,
        epsilon, HEADS, HALF,
    )  # fmt: skip
    _heads_forward(
        k + s * k_s + b * k_b, y_k + token * kv_heads * width, k_weight, c, d, k_h, kv_heads,
        half, epsilon, HEADS, HALF,
    )  # fmt: skip


@triton.jit
def _norm_rope_backward(  # type: ignore[no-untyped-def]
    q,
    k,
    grad_y_q,
    grad_y_k,
    q_weight,
    k_weight,
    grad_q,
    grad_k,
    partial,
    cos,
    sin,
    positions,
    epsilon,
    tokens,
    batch,
    half,
    heads,
    kv_heads,
    q_s,
    q_b,
    q_h,
    k_s,
    k_b,
    k_h,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Tokens program, program + programs, ...; gradients and outputs are contiguous. A row of
    `partial` is the gradients of both weights, [4 half]."""
    program = tl.program_id(0)
    width = 2 * half
    q_w_a = tl.zeros((HALF,), tl.float32)
    q_w_b = tl.zeros((HALF,), tl.float32)
    k_w_a = tl.zeros((HALF,), tl.float32)
    k_w_b = tl.zeros((HALF,), tl.float32)
    for turn in range(tl.cdiv(tokens - program, tl.num_programs(0))):
        token = program.to(tl.int64) + turn * tl.num_programs(0)
        s, b = token // batch, token % batch
        c, d = _angles(cos, sin, positions, token, s, half, POSITIONS, HALF)
        q_w_a, q_w_b = _heads_backward(
            q + s * q_s + b * q_b, grad_y_q + token * heads * width, grad_q + token * heads * width,
            q_weight, c, d, q_h, heads, half, epsilon, q_w_a, q_w_b, HEADS, HALF,
        )  # fmt: skip
        k_w_a, k_w_b = _heads_backward(
            k + s * k_s + b * k_b, grad_y_k + token * kv_heads * width,
            grad_k + token * kv_heads * width, k_weight, c, d, k_h, kv_heads, half,
            epsilon, k_w_a, k_w_b, HEADS, HALF,
        )  # fmt: skip
    columns = tl.arange(0, HALF)
    row = partial + program.to(tl.int64) * 4 * half + columns
    tl.store(row, q_w_a, columns < half)
    tl.store(row + half, q_w_b, columns < half)
    tl.store(row + 2 * half, k_w_a, columns < half)
    tl.store(row + 3 * half, k_w_b, columns < half)


@torch.library.custom_op("megapipe::norm_rope", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    check_heads("norm_rope", q, k, cos, sin)
    check_dtype("norm_rope", q_weight, k_weight)
    length, batch, heads, width = q.shape
    y_q, y_k = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel():
        _norm_rope_forward[(length * batch,)](
            q,
            k,
            q_weight,
            k_weight,
            y_q,
            y_k,
            cos.contiguous(),
            sin.contiguous(),
            None if positions_SB is None else positions_SB.contiguous(),
            epsilon,
            batch,
            width // 2,
            heads,
            k.shape[2],
            *q.stride()[:3],
            *k.stride()[:3],
            POSITIONS=positions_SB is not None,
            **head_tile(heads, width // 2),
            num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return y_q, y_k


@torch.library.custom_op("megapipe::norm_rope_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    grad_y_q: Tensor,
    grad_y_k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length, batch, heads, width = q.shape
    grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
    programs = min(length * batch, PROGRAMS)
    partial = q.new_empty((programs, 2 * width), dtype=torch.float32)
    if programs:
        _norm_rope_backward[(programs,)](
            q,
            k,
            grad_y_q.contiguous(),
            grad_y_k.contiguous(),
            q_weight,
            k_weight,
            grad_q,
            grad_k,
            partial,
            cos.contiguous(),
            sin.contiguous(),
            None if positions_SB is None else positions_SB.contiguous(),
            epsilon,
            length * batch,
            batch,
            width // 2,
            heads,
            k.shape[2],
            *q.stride()[:3],
            *k.stride()[:3],
            POSITIONS=positions_SB is not None,
            **head_tile(heads, width // 2),
            num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    weights = row_sums(partial)
    grad_weights = (part.to(q_weight.dtype, copy=True) for part in weights.split(width))
    return grad_q, grad_k, *grad_weights


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    grad_y_q: Tensor,
    grad_y_k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        torch.empty_like(q_weight),
        torch.empty_like(k_weight),
    )


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.epsilon = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, cos, sin, positions_SB = ctx.saved_tensors
    grads = _backward(q, k, grad_q, grad_k, q_weight, k_weight, cos, sin, positions_SB, ctx.epsilon)
    return (*grads, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_set_up)


def variants() -> Iterator[Variant]:
    """Both passes for heads of 128 and 64."""
    strides = [f"{x}_{dim}" for x in "qk" for dim in "sbh"]
    numbers = ["batch", "half", "heads", "kv_heads", *strides]
    for heads, width in ((64, 128), (16, 64)):
        for kernel, tensors, more in (
            (_norm_rope_forward, ("y_q", "y_k"), {}),
            (
                _norm_rope_backward,
                ("grad_y_q", "grad_y_k", "grad_q", "grad_k"),
                {"partial": "*fp32", "tokens": "i32"},
            ),
        ):
            yield Variant(
                kernel,
                f"{heads} heads of {width}, bf16",
                signature=dict.fromkeys(("q", "k", "q_weight", "k_weight", *tensors), "*bf16")
                | {"cos": "*fp32", "sin": "*fp32", "epsilon": "fp32"}
                | dict.fromkeys(numbers, "i32")
                | more,
                constants={"positions": None, "POSITIONS": False} | head_tile(heads, width // 2),
                num_warps=WARPS,
                divisible=("half", *strides),
            )
