"""The gradient of attention.py's queries, and the row sums that both backward kernels need.

Two passes make each score twice, and so every sum belongs to one program: no atomic addition, no
order that depends on timing. Dropout's factor is constant where it is not zero: it is applied to
sums, not to each probability.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from megapipe.kernels.attention_forward import (
    _count,
    _kept,
    _key_range,
    _place,
    _query_masks,
    _rows,
    _seen,
    _store_rows,
)
from megapipe.kernels.attention_settings import SUMS, signature, specimens, strides_of
from megapipe.kernels.compilation import Variant


@triton.jit(do_not_specialize=["heads", "length"])
def _attention_delta(  # type: ignore[no-untyped-def]
    out,
    grad_out,
    delta,
    out_b,
    out_h,
    out_s,
    grad_b,
    grad_h,
    grad_s,
    heads,
    length,
    kept_share,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta = (1 - dropout) sum over the width of out * grad_out, [B, N, S]."""
    blocks = tl.cdiv(length, BLOCK_M)
    m_first = tl.program_id(0) % blocks * BLOCK_M
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = row // heads, row % heads
    out += b * out_b + head * out_h
    grad_out += b * grad_b + head * grad_h
    o = _rows(out, m_first, out_s, length, WIDTH, True, BLOCK_M, BLOCK_D)
    do = _rows(grad_out, m_first, grad_s, length, WIDTH, True, BLOCK_M, BLOCK_D)
    m = m_first + tl.arange(0, BLOCK_M)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) * kept_share
    tl.store(delta + row * length + m, sums, m < length)


@triton.jit
def _query_gradients(  # type: ignore[no-untyped-def]
    dq,
    q,
    do,
    k,
    v,
    k_stride,
    v_stride,
    log_sum,
    delta,
    low,
    whole_low,
    whole_high,
    high,
    m,
    first,
    row_key,
    scale,
    length,
    last_kept,
    CUT: tl.constexpr,
    BOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The whole or the cut blocks of keys added to the gradient of queries, without its factor."""
    for index in range(_count(low, whole_low, whole_high, high, CUT, BLOCK_N)):
        n_first = _place(index, low, whole_low, whole_high, CUT, BLOCK_N)
        n = n_first + tl.arange(0, BLOCK_N)
        keys = _rows(k, n_first, k_stride, length, WIDTH, CUT, BLOCK_N, BLOCK_D)
        values = _rows(v, n_first, v_stride, length, WIDTH, CUT, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        p = tl.exp2(scores * scale - log_sum[:, None])
        if CUT:
            seen = _seen(m[:, None], n[None, :], first[:, None], BOUNDED)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(_kept(row_key[:, None], n[None, :], last_kept), dp, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit(
    do_not_specialize=["heads", "group", "length", "window", "key", "first_head", "last_kept"]
)
def _attention_backward_queries(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_q,
    bounds,
    samples,
    scale,
    grad_scale,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    grad_b,
    grad_h,
    grad_s,
    grad_q_b,
    grad_q_h,
    grad_q_s,
    heads,
    group,
    length,
    window,
    key,
    first_head,
    last_kept,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of a block of queries of one head; the last blocks come first."""
    blocks = tl.cdiv(length, BLOCK_M)
    m_first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = row // heads, row % heads
    k += b * k_b + head // group * k_h
    v += b * v_b + head // group * v_h
    m = m_first + tl.arange(0, BLOCK_M)
    starts, first, row_key = _query_masks(
        m, b, head, bounds, samples, length, window, key, first_head, WINDOW, DOCUMENTS, DROPOUT
    )
    q += b * q_b + head * q_h
    grad_out += b * grad_b + head * grad_h
    queries = _rows(q, m_first, q_s, length, WIDTH, True, BLOCK_M, BLOCK_D)
    do = _rows(grad_out, m_first, grad_s, length, WIDTH, True, BLOCK_M, BLOCK_D)
    log_sum = tl.load(lse + row * length + m, m < length, other=0)
    d = tl.load(delta + row * length + m, m < length, other=0)
    low, whole_low, whole_high, high = _key_range(
        m_first, length, window, starts, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = _query_gradients(
        dq, queries, do, k, v, k_s, v_s, log_sum, d, low, whole_low, whole_high, high, m, first,
        row_key, scale, length, last_kept, False, WINDOW or DOCUMENTS, DROPOUT, PRECISION, WIDTH,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _query_gradients(
        dq, queries, do, k, v, k_s, v_s, log_sum, d, low, whole_low, whole_high, high, m, first,
        row_key, scale, length, last_kept, True, WINDOW or DOCUMENTS, DROPOUT, PRECISION, WIDTH,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    grad_q += b * grad_q_b + head * grad_q_h
    _store_rows(grad_q, dq * grad_scale, m_first, grad_q_s, length, WIDTH, BLOCK_M, BLOCK_D)


def variants() -> Iterator[Variant]:
    """See `specimens`."""
    for specimen in specimens("queries"):
        yield specimen.variant(
            _attention_backward_queries,
            signature(specimen.dtype, "q", "k", "v", "grad_out", "grad_q")
            | SUMS
            | strides_of("q", "k", "v", "grad", "grad_q"),
        )
    for specimen in specimens("delta"):
        yield specimen.variant(
            _attention_delta,
            dict.fromkeys(("out", "grad_out"), f"*{specimen.dtype}")
            | {"delta": "*fp32", "heads": "i32", "length": "i32", "kept_share": "fp32"}
            | strides_of("out", "grad"),
        )
