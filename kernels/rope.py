"""Rotary position embedding (Su et al. 2021), in the halves layout of Llama's released weights.

    [a, b] = halves of a head;  y = [a cos - b sin, b cos + a sin],  angle = position * frequency

The gradient is the rotation by the opposite angle. Triton turns queries and keys in one launch, on
request in place: attention then keeps the projection's own output for its backward pass, and not a
turned copy beside it. With QK-norm see norm_rope.py.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapipe.kernels.backend import FP_FUSION, Backend, UnsupportedError, check_dtype, choose
from megapipe.kernels.compilation import Variant

TILE, WARPS = 1024, 4
"""Of Triton's: elements of one half of some heads that a program turns at once."""


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


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions_SB: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """q [S, B, N, D] and k [S, B, K, D], turned, as new tensors.

    `cos` and `sin` are [T, D / 2]; row s belongs to position s of the sequence, or the row that
    `positions_SB` (int32 or int64) names. q and k may have any strides but in D. Raises
    UnsupportedError for float64 in Triton.
    """
    if choose(backend, q) == "triton":
        turned_q, turned_k = torch.ops.megapipe.rope(q, k, cos, sin, positions_SB, False)
        return turned_q, turned_k
    cos, sin = (angle_table(x, q.shape[0], positions_SB) for x in (cos, sin))
    return _Reference.apply(q, cos, sin), _Reference.apply(k, cos, sin)


def rope_qkv_(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    *,
    positions_SB: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [S, B, N + 2 K, D] -> q [S, B, N, D], turned, k [S, B, K, D], turned, and v.

    Uses qkv up: in Triton all three are views of it, queries and keys turned in place, and their
    gradients are written straight into one of qkv's shape. It must be the output of an operation
    that has not saved it, and nothing else may read it. Otherwise as `rope`.
    """
    if choose(backend, qkv) == "triton":
        q, k, v = _InPlace.apply(qkv, heads, kv_heads, cos, sin, positions_SB)
        return q, k, v
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    return *rope(q, k, cos, sin, positions_SB=positions_SB, backend="torch"), v


def angle_table(table: Tensor, length: int, positions_SB: Tensor | None) -> Tensor:
    """[T, D / 2] -> what is multiplied with [S, B, heads, D / 2]."""
    if positions_SB is None:
        return table[:length, None, None]
    return table[positions_SB][:, :, None]


class _Reference(torch.autograd.Function):
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
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


class _InPlace(torch.autograd.Function):
    """Triton's, on the projection's output."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        heads: int,
        kv_heads: int,
        cos: Tensor,
        sin: Tensor,
        positions_SB: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin, positions_SB)
        torch.ops.megapipe.rope_(qkv, heads, kv_heads, cos, sin, positions_SB)
        return qkv.split([heads, kv_heads, kv_heads], dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.ops.megapipe.rope_gradient(*grads, *ctx.saved_tensors)
        return grad, None, None, None, None, None


@triton.jit
def _angles(  # type: ignore[no-untyped-def]
    cos, sin, positions, token, s, half, POSITIONS: tl.constexpr, HALF: tl.constexpr
):
    """(cos, sin), [1, HALF] each, of a token at place s of the sequence."""
    position = s
    if POSITIONS:
        position = tl.load(positions + token).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    angles = position * half + column
    c = tl.load(cos + angles, column < half, other=0).to(tl.float32)
    return c, tl.load(sin + angles, column < half, other=0).to(tl.float32)


@triton.jit
def _halves(x, column, inside, half):  # type: ignore[no-untyped-def]
    """What is at `column` and at `column` + half."""
    a = tl.load(x + column, inside, other=0).to(tl.float32)
    return a, tl.load(x + half + column, inside, other=0).to(tl.float32)


@triton.jit
def _far(index, stride):  # type: ignore[no-untyped-def]
    """Heads may lie further apart than 32 bits can tell: a whole long sequence."""
    return index * tl.cast(stride, tl.int64)


@triton.jit
def _turn_heads(  # type: ignore[no-untyped-def]
    x,
    out,
    head_stride,
    out_head_stride,
    heads,
    half,
    cos,
    sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """All heads of one token, HEADS at a time; cos and sin are [1, HALF]."""
    column = tl.arange(0, HALF)[None, :]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (column < half)
        a, b = _halves(x + _far(head, head_stride), column, inside, half)
        turned_a = a * cos - b * sin
        turned_b = b * cos + a * sin
        places = out + _far(head, out_head_stride) + column
        tl.store(places, turned_a.to(out.dtype.element_ty), inside)
        tl.store(places + half, turned_b.to(out.dtype.element_ty), inside)


@triton.jit
def _rope(  # type: ignore[no-untyped-def]
    q,
    k,
    out_q,
    out_k,
    cos,
    sin,
    positions,
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
    out_q_s,
    out_q_b,
    out_q_h,
    out_k_s,
    out_k_b,
    out_k_h,
    OPPOSITE: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One token: strides of the sequence, the batch and the heads follow each tensor's name."""
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    c, d = _angles(cos, sin, positions, token, s, half, POSITIONS, HALF)
    if OPPOSITE:
        d = -d
    _turn_heads(
        q + s * q_s + b * q_b, out_q + s * out_q_s + b * out_q_b, q_h, out_q_h, heads, half, c, d,
        HEADS, HALF,
    )  # fmt: skip
    _turn_heads(
        k + s * k_s + b * k_b, out_k + s * out_k_s + b * out_k_b, k_h, out_k_h, kv_heads, half, c,
        d, HEADS, HALF,
    )  # fmt: skip


def head_tile(heads: int, half: int) -> dict[str, int]:
    """HEADS, of which a program turns so many at a time, and HALF, the columns of a half."""
    columns = triton.next_power_of_2(half)
    heads = min(triton.next_power_of_2(heads), max(1, TILE // columns))
    return {"HEADS": heads, "HALF": columns}


def check_heads(kernel: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises UnsupportedError for heads that the kernel of this name cannot turn."""
    check_dtype(kernel, q, k)
    width = q.shape[3]
    if width % 2 or q.stride(3) != 1 or k.stride(3) != 1:
        raise UnsupportedError(kernel, f"heads of width {width}, strides {q.stride()}")
    assert cos.shape[1] == sin.shape[1] == width // 2


def _launch(
    q: Tensor,
    k: Tensor,
    out_q: Tensor,
    out_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
    opposite: bool,
) -> None:
    check_heads("rope", q, k, cos, sin)
    (length, batch, heads, width), kv_heads = q.shape, k.shape[2]
    assert positions_SB is not None or cos.shape[0] >= length
    if q.numel():
        _rope[(length * batch,)](
            q,
            k,
            out_q,
            out_k,
            cos.contiguous(),
            sin.contiguous(),
            None if positions_SB is None else positions_SB.contiguous(),
            batch,
            width // 2,
            heads,
            kv_heads,
            *(stride for x in (q, k, out_q, out_k) for stride in x.stride()[:3]),
            OPPOSITE=opposite,
            POSITIONS=positions_SB is not None,
            **head_tile(heads, width // 2),
            num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )


@torch.library.custom_op("megapipe::rope", mutates_args=())
def _turned(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
    opposite: bool,
) -> tuple[Tensor, Tensor]:
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _launch(q, k, out_q, out_k, cos, sin, positions_SB, opposite)
    return out_q, out_k


@torch.library.custom_op("megapipe::rope_", mutates_args=("qkv",))
def _turn_(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
) -> None:
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=2)
    _launch(q, k, q, k, cos, sin, positions_SB, False)


@torch.library.custom_op("megapipe::rope_gradient", mutates_args=())
def _gradient(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
) -> Tensor:
    """Of all heads [S, B, N + 2 K, D], from those of its parts."""
    grad_qkv = _joined(grad_q, grad_k, grad_v)
    heads = [x.shape[2] for x in (grad_q, grad_k, grad_v)]
    out_q, out_k, out_v = grad_qkv.split(heads, dim=2)
    _launch(_by_rows(grad_q), _by_rows(grad_k), out_q, out_k, cos, sin, positions_SB, True)
    out_v.copy_(grad_v)
    return grad_qkv


def _by_rows(grad: Tensor) -> Tensor:
    """As the kernel reads it; one that a sum expanded has strides of 0."""
    return grad if grad.stride(3) == 1 else grad.contiguous()


def _joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Empty, of the shape of all heads."""
    length, batch, _, width = q.shape
    return q.new_empty(length, batch, sum(x.shape[2] for x in (q, k, v)), width)


@_turned.register_fake
def _(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
    opposite: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_turn_.register_fake
def _(*args: object) -> None:
    return None


@_gradient.register_fake
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_SB: Tensor | None,
) -> Tensor:
    return _joined(grad_q, grad_k, grad_v)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, cos, sin, positions_SB, ctx.opposite = inputs
    ctx.save_for_backward(cos, sin, positions_SB)


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions_SB = ctx.saved_tensors
    grads = _by_rows(grad_q), _by_rows(grad_k)
    turned = _turned(*grads, cos, sin, positions_SB, not ctx.opposite)
    return (*turned, None, None, None, None)


_turned.register_autograd(_differentiate, setup_context=_set_up)


def variants() -> Iterator[Variant]:
    """Heads of 64 and 128 of a wide and a narrow layer."""
    strides = [f"{x}_{dim}" for x in ("q", "k", "out_q", "out_k") for dim in "sbh"]
    numbers = ["batch", "half", "heads", "kv_heads", *strides]
    for heads, width, positions in ((12, 64, False), (64, 128, False), (32, 128, True)):
        yield Variant(
            _rope,
            f"{heads} heads of {width}, {'positions given, ' if positions else ''}bf16",
            signature=dict.fromkeys(("q", "k", "out_q", "out_k"), "*bf16")
            | {"cos": "*fp32", "sin": "*fp32"}
            | dict.fromkeys(numbers, "i32")
            | ({"positions": "*i32"} if positions else {}),
            constants={"OPPOSITE": True, "POSITIONS": positions}
            | head_tile(heads, width // 2)
            | ({} if positions else {"positions": None}),
            num_warps=WARPS,
            divisible=("half", *strides),
        )
