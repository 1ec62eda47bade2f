"""The Triton kernels of attention.py: forward, and backward by queries and by keys.

Blocks of keys (or queries) that a mask cuts through are worked on apart from those that it leaves
whole, where no comparison is made; blocks that it hides are not visited. Scores are in units of
log 2, so that exponentials are exp2. Names: m of a query, n of a key; a block of queries begins at
`m_first`, one of keys at `n_first`; `bounds` holds for each token the first one of its document and
the one after its last, [2, B, S].
"""

import triton
import triton.language as tl

from megapipe.kernels.random import _hash32, _hash64


@triton.jit
def _seen(  # type: ignore[no-untyped-def]
    m, n, start, length, window, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Whether query m may look at key n; `start` is where the query's document begins."""
    seen = (n <= m) & (m < length)
    if WINDOW:
        seen &= m - n < window
    if DOCUMENTS:
        seen &= n >= start
    return seen


@triton.jit
def _kept(row_key, n, last_kept):  # type: ignore[no-untyped-def]
    """Dropout's mask, from the keys of the queries' rows and the keys' positions."""
    return _hash32(row_key, n) <= last_kept


@triton.jit
def _row_keys(samples, b, head, m, key):  # type: ignore[no-untyped-def]
    """Of queries m of a sample and head: see attention_dropout_mask."""
    sample_key = _hash64(key, tl.load(samples + b))
    head_key = _hash64(key, sample_key + tl.cast(head, tl.uint64))
    return _hash64(key, head_key + m.to(tl.uint64))


@triton.jit
def _key_range(  # type: ignore[no-untyped-def]
    m_first,
    length,
    window,
    bounds,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(low, whole_low, whole_high, high): keys that a block of queries sees are in [low, high), and
    each query sees all of [whole_low, whole_high); all but `high` are multiples of BLOCK_N."""
    m_last = tl.minimum(m_first + BLOCK_M, length) - 1
    high = m_last + 1
    low = m_first * 0
    whole_low = m_first * 0
    if WINDOW:
        low = tl.maximum(low, m_first - window + 1)
        whole_low = tl.maximum(whole_low, m_last - window + 1)
    if DOCUMENTS:
        low = tl.maximum(low, tl.load(bounds + m_first))
        whole_low = tl.maximum(whole_low, tl.load(bounds + m_last))
    low = low // BLOCK_N * BLOCK_N
    whole_low = tl.cdiv(whole_low, BLOCK_N) * BLOCK_N
    # With fewer queries than a block has, the rows beyond see what they like: they are not stored.
    whole_high = tl.maximum((m_first + 1) // BLOCK_N * BLOCK_N, low)
    whole_low = tl.minimum(whole_low, whole_high)
    return low, whole_low, whole_high, high


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
    """(low, whole_low, whole_high, high) as `_key_range`, of queries that see a block of keys."""
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
def _rows(base, first, stride, length, width, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK, BLOCK_D] of a [length, width] matrix from row `first`, 0 beyond it."""
    row = first + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    places = base + row * tl.cast(stride, tl.int64) + column
    return tl.load(places, (row < length) & (column < width), other=0)


@triton.jit
def _store_rows(  # type: ignore[no-untyped-def]
    base, values, first, stride, length, width, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = first + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    places = base + row * tl.cast(stride, tl.int64) + column
    tl.store(places, values.to(base.dtype.element_ty), (row < length) & (column < width))


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    out,
    total,
    largest,
    q,
    k,
    v,
    k_stride,
    v_stride,
    begin,
    end,
    m,
    start,
    row_key,
    scale,
    length,
    width,
    window,
    last_kept,
    keep_scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys from `begin` to `end` added to the output so far, the sum and the maximum."""
    for n_first in range(begin, end, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        keys = _rows(k, n_first, k_stride, length, width, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        if MASKED:
            seen = _seen(m[:, None], n[None, :], start[:, None], length, window, WINDOW, DOCUMENTS)
            scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = larger
        if MASKED:  # a query that has seen nothing yet
            shift = tl.where(larger == -float("inf"), 0.0, larger)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(_kept(row_key[:, None], n[None, :], last_kept), p * keep_scale, 0.0)
        values = _rows(v, n_first, v_stride, length, width, BLOCK_N, BLOCK_D)
        out = out * shrink[:, None]
        out = tl.dot(p.to(values.dtype), values, out, input_precision=PRECISION)
        largest = larger
    return out, total, largest


@triton.jit(do_not_specialize=["key", "first_head", "last_kept", "window"])
def _attention_forward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    out,
    lse,
    bounds,
    samples,
    scale,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    out_b,
    out_h,
    out_s,
    heads,
    group,
    length,
    width,
    window,
    key,
    first_head,
    last_kept,
    keep_scale,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of queries of one head. The last blocks, which see the most keys, come first."""
    m_first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    b = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    q += b * q_b + head * q_h
    k += b * k_b + head // group * k_h
    v += b * v_b + head // group * v_h
    m = m_first + tl.arange(0, BLOCK_M)
    start = m * 0
    row_key = m * 0
    if DOCUMENTS:
        start = tl.load(bounds + b * length + m, m < length, other=0)
    if DROPOUT:
        row_key = _row_keys(samples, b, first_head + head, m, key)
    queries = _rows(q, m_first, q_s, length, width, BLOCK_M, BLOCK_D)
    low, whole_low, whole_high, high = _key_range(
        m_first, length, window, bounds + b * length, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N
    )
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if WINDOW or DOCUMENTS:
        o, total, largest = _attend(
            o, total, largest, queries, k, v, k_s, v_s, low, whole_low, m, start, row_key, scale,
            length, width, window, last_kept, keep_scale, True, WINDOW, DOCUMENTS, DROPOUT,
            PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    o, total, largest = _attend(
        o, total, largest, queries, k, v, k_s, v_s, whole_low, whole_high, m, start, row_key,
        scale, length, width, window, last_kept, keep_scale, False, WINDOW, DOCUMENTS, DROPOUT,
        PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    o, total, largest = _attend(
        o, total, largest, queries, k, v, k_s, v_s, whole_high, high, m, start, row_key, scale,
        length, width, window, last_kept, keep_scale, True, WINDOW, DOCUMENTS, DROPOUT,
        PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    _store_rows(
        out + b * out_b + head * out_h,
        o / total[:, None],
        m_first,
        out_s,
        length,
        width,
        BLOCK_M,
        BLOCK_D,
    )
    tl.store(lse + tl.program_id(1).to(tl.int64) * length + m, largest + tl.log2(total), m < length)


@triton.jit
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
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta = sum over the width of out * grad_out, [B, N, S]."""
    m_first = tl.program_id(0) * BLOCK_M
    b = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    o = _rows(out + b * out_b + head * out_h, m_first, out_s, length, width, BLOCK_M, BLOCK_D)
    do = _rows(
        grad_out + b * grad_b + head * grad_h, m_first, grad_s, length, width, BLOCK_M, BLOCK_D
    )
    m = m_first + tl.arange(0, BLOCK_M)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + tl.program_id(1).to(tl.int64) * length + m, sums, m < length)


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
    begin,
    end,
    m,
    start,
    row_key,
    scale,
    length,
    width,
    window,
    last_kept,
    keep_scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys from `begin` to `end` added to the gradient of a block of queries, without the scale."""
    for n_first in range(begin, end, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        keys = _rows(k, n_first, k_stride, length, width, BLOCK_N, BLOCK_D)
        values = _rows(v, n_first, v_stride, length, width, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        p = tl.exp2(scores - log_sum[:, None])
        if MASKED:
            seen = _seen(m[:, None], n[None, :], start[:, None], length, window, WINDOW, DOCUMENTS)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(_kept(row_key[:, None], n[None, :], last_kept), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["key", "first_head", "last_kept", "window"])
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
    natural_scale,
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
    width,
    window,
    key,
    first_head,
    last_kept,
    keep_scale,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of a block of queries of one head."""
    m_first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = tl.program_id(1).to(tl.int64) * length
    b = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    k += b * k_b + head // group * k_h
    v += b * v_b + head // group * v_h
    m = m_first + tl.arange(0, BLOCK_M)
    start = m * 0
    row_key = m * 0
    if DOCUMENTS:
        start = tl.load(bounds + b * length + m, m < length, other=0)
    if DROPOUT:
        row_key = _row_keys(samples, b, first_head + head, m, key)
    queries = _rows(q + b * q_b + head * q_h, m_first, q_s, length, width, BLOCK_M, BLOCK_D)
    do = _rows(
        grad_out + b * grad_b + head * grad_h, m_first, grad_s, length, width, BLOCK_M, BLOCK_D
    )
    log_sum = tl.load(lse + row + m, m < length, other=0)
    d = tl.load(delta + row + m, m < length, other=0)
    low, whole_low, whole_high, high = _key_range(
        m_first, length, window, bounds + b * length, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW or DOCUMENTS:
        dq = _query_gradients(
            dq, queries, do, k, v, k_s, v_s, log_sum, d, low, whole_low, m, start, row_key, scale,
            length, width, window, last_kept, keep_scale, True, WINDOW, DOCUMENTS, DROPOUT,
            PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dq = _query_gradients(
        dq, queries, do, k, v, k_s, v_s, log_sum, d, whole_low, whole_high, m, start, row_key,
        scale, length, width, window, last_kept, keep_scale, False, WINDOW, DOCUMENTS, DROPOUT,
        PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _query_gradients(
        dq, queries, do, k, v, k_s, v_s, log_sum, d, whole_high, high, m, start, row_key, scale,
        length, width, window, last_kept, keep_scale, True, WINDOW, DOCUMENTS, DROPOUT,
        PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    _store_rows(
        grad_q + b * grad_q_b + head * grad_q_h,
        dq * natural_scale,
        m_first,
        grad_q_s,
        length,
        width,
        BLOCK_M,
        BLOCK_D,
    )


@triton.jit
def _key_gradients(  # type: ignore[no-untyped-def]
    dk,
    dv,
    keys,
    values,
    q,
    grad_out,
    q_stride,
    grad_stride,
    lse,
    delta,
    bounds,
    samples,
    b,
    head,
    begin,
    end,
    n,
    scale,
    length,
    width,
    window,
    key,
    last_kept,
    keep_scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Queries of one head from `begin` to `end` added to the gradients of a block of keys (without
    the scale) and values. Tiles are [keys, queries]."""
    for m_first in range(begin, end, BLOCK_M):
        m = m_first + tl.arange(0, BLOCK_M)
        queries = _rows(q, m_first, q_stride, length, width, BLOCK_M, BLOCK_D)
        do = _rows(grad_out, m_first, grad_stride, length, width, BLOCK_M, BLOCK_D)
        log_sum = tl.load(lse + m, m < length, other=0)
        d = tl.load(delta + m, m < length, other=0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        p = tl.exp2(scores - log_sum[None, :])
        if MASKED:
            start = m * 0
            if DOCUMENTS:
                start = tl.load(bounds + m, m < length, other=0)
            seen = _seen(m[None, :], n[:, None], start[None, :], length, window, WINDOW, DOCUMENTS)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(values, tl.trans(do), input_precision=PRECISION)
        if DROPOUT:
            row_key = _row_keys(samples, b, head, m, key)
            keep = _kept(row_key[None, :], n[:, None], last_kept)
            dv = tl.dot(
                tl.where(keep, p * keep_scale, 0.0).to(do.dtype),
                do,
                dv,
                input_precision=PRECISION,
            )
            dp = tl.where(keep, dp * keep_scale, 0.0)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - d[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["key", "first_head", "last_kept", "window"])
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
    natural_scale,
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
    width,
    window,
    key,
    first_head,
    last_kept,
    keep_scale,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of a block of keys and values of one key/value head, from all the query heads
    that share it, one after the other. The first blocks, which most queries see, come first."""
    n_first = tl.program_id(0) * BLOCK_N
    kv_heads = heads // group
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    n = n_first + tl.arange(0, BLOCK_N)
    keys = _rows(k + b * k_b + kv_head * k_h, n_first, k_s, length, width, BLOCK_N, BLOCK_D)
    values = _rows(v + b * v_b + kv_head * v_h, n_first, v_s, length, width, BLOCK_N, BLOCK_D)
    starts = bounds + b * length
    low, whole_low, whole_high, high = _query_range(
        n_first,
        length,
        window,
        starts + tl.cast(batch, tl.int64) * length,
        WINDOW,
        DOCUMENTS,
        BLOCK_M,
        BLOCK_N,
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        row = (b * heads + head) * length
        queries = q + b * q_b + head * q_h
        do = grad_out + b * grad_b + head * grad_h
        number = first_head + head
        dk, dv = _key_gradients(
            dk, dv, keys, values, queries, do, q_s, grad_s, lse + row, delta + row, starts,
            samples, b, number, low, whole_low, n, scale, length, width, window, key, last_kept,
            keep_scale, True, WINDOW, DOCUMENTS, DROPOUT, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        dk, dv = _key_gradients(
            dk, dv, keys, values, queries, do, q_s, grad_s, lse + row, delta + row, starts,
            samples, b, number, whole_low, whole_high, n, scale, length, width, window, key,
            last_kept, keep_scale, False, WINDOW, DOCUMENTS, DROPOUT, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        dk, dv = _key_gradients(
            dk, dv, keys, values, queries, do, q_s, grad_s, lse + row, delta + row, starts,
            samples, b, number, whole_high, high, n, scale, length, width, window, key, last_kept,
            keep_scale, True, WINDOW, DOCUMENTS, DROPOUT, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    base = b * grad_k_b + kv_head * grad_k_h
    _store_rows(
        grad_k + base, dk * natural_scale, n_first, grad_k_s, length, width, BLOCK_N, BLOCK_D
    )
    _store_rows(grad_v + base, dv, n_first, grad_k_s, length, width, BLOCK_N, BLOCK_D)
