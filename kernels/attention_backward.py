"""The backward kernels of attention.py: by queries, by keys, and the row sums that both need.

Two passes make each score twice, and so every sum belongs to one program: no atomic addition, no
order that depends on timing. A key/value head's program goes through its query heads in turn.
Dropout's factor is constant where it is not zero: it is applied to sums, not to each probability.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from megapipe.kernels.attention_forward import (
    _count,
    _first_seen,
    _head_key,
    _kept,
    _key_range,
    _place,
    _rows,
    _seen,
    _store_rows,
)
from megapipe.kernels.attention_settings import signature, specimens, strides_of
from megapipe.kernels.compilation import Variant
from megapipe.kernels.random import _hash64


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
    row_key = m
    starts = bounds
    if DOCUMENTS:
        starts += b * length
    first = _first_seen(m, starts, length, window, WINDOW, DOCUMENTS)
    if DROPOUT:
        row_key = _hash64(key, _head_key(samples, b, first_head + head, key) + m.to(tl.uint64))
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


@triton.jit
def _query_range(  # type: ignore[no-untyped-def]
    n_first,
    length,
    window,
    ends,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As `_key_range`, of the queries that see a block of keys."""
    n_last = tl.minimum(n_first + BLOCK_N, length) - 1
    high = n_first * 0 + length
    whole_high = n_first * 0 + length
    if WINDOW:
        high = tl.minimum(high, n_last + window)
        whole_high = tl.minimum(whole_high, n_first + window)
    if DOCUMENTS:
        high = tl.minimum(high, tl.load(ends + n_last))
        whole_high = tl.minimum(whole_high, tl.load(ends + n_first))
    low = n_first // BLOCK_M * BLOCK_M
    whole_high = tl.maximum(whole_high // BLOCK_M * BLOCK_M, low)
    whole_low = tl.minimum(tl.cdiv(n_last, BLOCK_M) * BLOCK_M, whole_high)
    return low, whole_low, whole_high, high


@triton.jit
def _key_gradients(  # type: ignore[no-untyped-def]
    dk,
    dv,
    keys,
    values,
    q,
    grad_out,
    lse,
    delta,
    samples,
    b,
    first_head,
    q_h,
    q_s,
    grad_h,
    grad_s,
    group,
    low,
    whole_low,
    whole_high,
    high,
    n,
    after,
    scale,
    length,
    key,
    last_kept,
    CUT: tl.constexpr,
    BOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The whole or the cut blocks of queries, of each of the heads from `first_head`, added to the
    gradients of a block of keys and values, without their factors. Tiles are [keys, queries]."""
    count = _count(low, whole_low, whole_high, high, CUT, BLOCK_M)
    for index in range(group * count):  # one loop, so that loads run ahead from head to head
        member = tl.cast(index // count, tl.int64)
        m_first = _place(index % count, low, whole_low, whole_high, CUT, BLOCK_M)
        m = m_first + tl.arange(0, BLOCK_M)
        queries = _rows(q + member * q_h, m_first, q_s, length, WIDTH, CUT, BLOCK_M, BLOCK_D)
        do = _rows(
            grad_out + member * grad_h, m_first, grad_s, length, WIDTH, CUT, BLOCK_M, BLOCK_D
        )
        inside = (m < length) | (not CUT)
        log_sum = tl.load(lse + member * length + m, inside, other=0)
        d = tl.load(delta + member * length + m, inside, other=0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        p = tl.exp2(scores * scale - log_sum[None, :])
        if CUT:
            seen = m[None, :] >= n[:, None]
            if BOUNDED:  # n <= m < after in one comparison: m - n below 0 wraps around
                seen = (m[None, :] - n[:, None]).to(tl.uint32) < (after - n)[:, None].to(tl.uint32)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(values, tl.trans(do), input_precision=PRECISION)
        kept = p
        if DROPOUT:
            row_key = _hash64(
                key, _head_key(samples, b, first_head + member, key) + m.to(tl.uint64)
            )
            keep = _kept(row_key[None, :], n[:, None], last_kept)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - d[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "heads", "group", "batch", "length", "window", "key", "first_head", "last_kept",
    ]
)  # fmt: skip
def _attention_backward_keys(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
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
    grad_k_b,
    grad_k_h,
    grad_k_s,
    heads,
    group,
    batch,
    length,
    window,
    key,
    first_head,
    last_kept,
    keep_scale,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of a block of keys and values of one key/value head, from all the query heads
    that share it, one after the other. The first blocks, which most queries see, come first."""
    blocks = tl.cdiv(length, BLOCK_N)
    n_first = tl.program_id(0) % blocks * BLOCK_N
    kv_row = (tl.program_id(0) // blocks).to(tl.int64)
    kv_heads = heads // group
    b, kv_head = kv_row // kv_heads, kv_row % kv_heads
    n = n_first + tl.arange(0, BLOCK_N)
    k += b * k_b + kv_head * k_h
    v += b * v_b + kv_head * v_h
    keys = _rows(k, n_first, k_s, length, WIDTH, True, BLOCK_N, BLOCK_D)
    values = _rows(v, n_first, v_s, length, WIDTH, True, BLOCK_N, BLOCK_D)
    ends = bounds
    after = n * 0 + length  # the first query that no longer sees each key
    if DOCUMENTS:
        ends += (b + batch) * length
        after = tl.load(ends + n, n < length, other=0)
    if WINDOW:
        after = tl.minimum(after, n + window)
    low, whole_low, whole_high, high = _query_range(
        n_first, length, window, ends, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    head = kv_head * group
    q += b * q_b + head * q_h
    grad_out += b * grad_b + head * grad_h
    lse += (b * heads + head) * length
    delta += (b * heads + head) * length
    head += first_head
    dk, dv = _key_gradients(
        dk, dv, keys, values, q, grad_out, lse, delta, samples, b, head, q_h, q_s, grad_h, grad_s,
        group, low, whole_low, whole_high, high, n, after, scale, length, key, last_kept, False,
        WINDOW or DOCUMENTS, DROPOUT, PRECISION, WIDTH, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dk, dv = _key_gradients(
        dk, dv, keys, values, q, grad_out, lse, delta, samples, b, head, q_h, q_s, grad_h, grad_s,
        group, low, whole_low, whole_high, high, n, after, scale, length, key, last_kept, True,
        WINDOW or DOCUMENTS, DROPOUT, PRECISION, WIDTH, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    base = b * grad_k_b + kv_head * grad_k_h
    _store_rows(grad_k + base, dk * grad_scale, n_first, grad_k_s, length, WIDTH, BLOCK_N, BLOCK_D)
    _store_rows(grad_v + base, dv * keep_scale, n_first, grad_k_s, length, WIDTH, BLOCK_N, BLOCK_D)


def variants() -> Iterator[Variant]:
    """Each head width's block, float32, and all masks at once."""
    sums = {"lse": "*fp32", "delta": "*fp32", "grad_scale": "fp32"}
    inputs = strides_of("q", "k", "v", "grad")
    for specimen in specimens("queries"):
        yield specimen.variant(
            _attention_backward_queries,
            signature(specimen.dtype, "q", "k", "v", "grad_out", "grad_q")
            | sums
            | inputs
            | strides_of("grad_q"),
        )
    for specimen in specimens("keys"):
        yield specimen.variant(
            _attention_backward_keys,
            signature(specimen.dtype, "q", "k", "v", "grad_out", "grad_k", "grad_v")
            | sums
            | {"keep_scale": "fp32", "batch": "i32"}
            | inputs
            | strides_of("grad_k"),
        )
    for specimen in specimens("delta"):
        yield specimen.variant(
            _attention_delta,
            dict.fromkeys(("out", "grad_out"), f"*{specimen.dtype}")
            | {"delta": "*fp32", "heads": "i32", "length": "i32", "kept_share": "fp32"}
            | strides_of("out", "grad"),
        )
