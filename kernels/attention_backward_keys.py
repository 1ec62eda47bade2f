"""The gradients of attention.py's keys and values.

One program has a block of them and goes through the query heads that share it in turn: no atomic
addition, no order that depends on timing. Dropout's factor is applied to sums, as for queries.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from megapipe.kernels.attention_forward import (
    _count,
    _head_key,
    _kept,
    _place,
    _rows,
    _store_rows,
)
from megapipe.kernels.attention_settings import SUMS, signature, specimens, strides_of
from megapipe.kernels.compilation import Variant
from megapipe.kernels.random import _hash64


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
    """See `specimens`."""
    for specimen in specimens("keys"):
        yield specimen.variant(
            _attention_backward_keys,
            signature(specimen.dtype, "q", "k", "v", "grad_out", "grad_k", "grad_v")
            | SUMS
            | {"keep_scale": "fp32", "batch": "i32"}
            | strides_of("q", "k", "v", "grad", "grad_k"),
        )
