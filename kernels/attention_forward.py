"""The forward kernel of attention.py, and what it shares with the backward ones.

Blocks of keys (or queries) that a mask cuts through are worked on apart from those that it leaves
whole, where no comparison is made; blocks that it hides are not visited. Scores are in units of
log 2, so that exponentials are exp2. Names: m of a query, n of a key; a block of queries begins at
`m_first`, one of keys at `n_first`; `bounds` holds for each token the first one of its document and
the one after its last, [2, B, S].

What is beyond the end reads as zeros. A query there sees what it likes, for it is not stored; a key
there comes after all queries, so that none sees it.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from megapipe.kernels.attention_settings import signature, specimens, strides_of
from megapipe.kernels.compilation import Variant
from megapipe.kernels.random import _hash32, _hash64


@triton.jit
def _first_seen(  # type: ignore[no-untyped-def]
    m, starts, length, window, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """The first key that each query may look at; `starts` is where its document begins."""
    first = m * 0
    if DOCUMENTS:
        first = tl.load(starts + m, m < length, other=0)
    if WINDOW:
        first = tl.maximum(first, m - window + 1)
    return first


@triton.jit
def _seen(m, n, first, BOUNDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether query m may look at key n: first <= n <= m."""
    if BOUNDED:  # one comparison, for what is below `first` wraps around
        return (n - first).to(tl.uint32) <= (m - first).to(tl.uint32)
    return n <= m


@triton.jit
def _kept(row_key, n, last_kept):  # type: ignore[no-untyped-def]
    """Dropout's mask, from the keys of the queries' rows and the keys' positions."""
    return _hash32(row_key, n) <= last_kept


@triton.jit
def _head_key(samples, b, head, key):  # type: ignore[no-untyped-def]
    """Of a sample's head: its queries' row keys are _hash64(key, _head_key(...) + m), as in
    attention_dropout_mask."""
    return _hash64(key, _hash64(key, tl.load(samples + b)) + tl.cast(head, tl.uint64))


@triton.jit
def _query_masks(  # type: ignore[no-untyped-def]
    m,
    b,
    head,
    bounds,
    samples,
    length,
    window,
    key,
    first_head,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """(the sample's document starts, the first key that each query of a head sees, their rows' keys
    for dropout); what no mask needs is any number."""
    starts = m  # not `bounds`: where that is None, a launch cannot hand it on
    if DOCUMENTS:
        starts = bounds + b * length
    row_key = m
    if DROPOUT:
        row_key = _hash64(key, _head_key(samples, b, first_head + head, key) + m.to(tl.uint64))
    return starts, _first_seen(m, starts, length, window, WINDOW, DOCUMENTS), row_key


@triton.jit
def _key_range(  # type: ignore[no-untyped-def]
    m_first,
    length,
    window,
    starts,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(low, whole_low, whole_high, high): keys that a block of queries sees are in [low, high), and
    each query sees all of [whole_low, whole_high); all but `high` are multiples of BLOCK_N. What is
    in the first but not in the second are the blocks that a mask cuts."""
    m_last = tl.minimum(m_first + BLOCK_M, length) - 1
    high = m_last + 1
    low = m_first * 0
    whole_low = m_first * 0
    if WINDOW:
        low = tl.maximum(low, m_first - window + 1)
        whole_low = tl.maximum(whole_low, m_last - window + 1)
    if DOCUMENTS:
        low = tl.maximum(low, tl.load(starts + m_first))
        whole_low = tl.maximum(whole_low, tl.load(starts + m_last))
    low = low // BLOCK_N * BLOCK_N
    whole_low = tl.cdiv(whole_low, BLOCK_N) * BLOCK_N
    whole_high = tl.maximum((m_first + 1) // BLOCK_N * BLOCK_N, low)
    whole_low = tl.minimum(whole_low, whole_high)
    return low, whole_low, whole_high, high


@triton.jit
def _count(  # type: ignore[no-untyped-def]
    low, whole_low, whole_high, high, CUT: tl.constexpr, BLOCK: tl.constexpr
):
    """How many blocks are cut, or whole."""
    if CUT:
        return (whole_low - low) // BLOCK + tl.cdiv(high - whole_high, BLOCK)
    return (whole_high - whole_low) // BLOCK


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    index, low, whole_low, whole_high, CUT: tl.constexpr, BLOCK: tl.constexpr
):
    """Where the block of this index, of the cut or of the whole ones, begins."""
    if CUT:
        place = low + index * BLOCK
        return tl.where(place < whole_low, place, place + (whole_high - whole_low))
    return whole_low + index * BLOCK


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    base,
    first,
    stride,
    length,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK, BLOCK_D] of a [length, WIDTH] matrix from row `first`. Without EDGE all of the rows
    are in it; with, what is beyond reads as 0."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    # Places within the block in 32 bits, the same in each turn of a loop.
    places = base + first * tl.cast(stride, tl.int64) + (row * stride + column)
    if EDGE:
        return tl.load(places, (first + row < length) & (column < WIDTH), other=0)
    if WIDTH < BLOCK_D:
        return tl.load(places, (row >= 0) & (column < WIDTH), other=0)
    return tl.load(places)


@triton.jit
def _store_rows(  # type: ignore[no-untyped-def]
    base, values, first, stride, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    places = base + first * tl.cast(stride, tl.int64) + (row * stride + column)
    inside = (first + row < length) & (column < WIDTH)
    tl.store(places, values.to(base.dtype.element_ty), inside)


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
    """The whole or the cut blocks of keys added to the output so far, the sum and the maximum."""
    for index in range(_count(low, whole_low, whole_high, high, CUT, BLOCK_N)):
        n_first = _place(index, low, whole_low, whole_high, CUT, BLOCK_N)
        n = n_first + tl.arange(0, BLOCK_N)
        keys = _rows(k, n_first, k_stride, length, WIDTH, CUT, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        if CUT:
            seen = _seen(m[:, None], n[None, :], first[:, None], BOUNDED)
            scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        shift = larger
        if CUT and BOUNDED:  # a query that has seen nothing yet
            shift = tl.where(larger == -float("inf"), 0.0, larger)
        p = tl.exp2(scores * scale - shift[:, None])  # one instruction before the exponential
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(_kept(row_key[:, None], n[None, :], last_kept), p, 0.0)
        values = _rows(v, n_first, v_stride, length, WIDTH, CUT, BLOCK_N, BLOCK_D)
        out = out * shrink[:, None]
        out = tl.dot(p.to(values.dtype), values, out, input_precision=PRECISION)
        largest = larger
    return out, total, largest


@triton.jit(
    do_not_specialize=["heads", "group", "length", "window", "key", "first_head", "last_kept"]
)
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
    """A block of queries of one head. The last blocks, which see the most keys, come first."""
    blocks = tl.cdiv(length, BLOCK_M)
    m_first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = row // heads, row % heads
    q += b * q_b + head * q_h
    k += b * k_b + head // group * k_h
    v += b * v_b + head // group * v_h
    m = m_first + tl.arange(0, BLOCK_M)
    starts, first, row_key = _query_masks(
        m, b, head, bounds, samples, length, window, key, first_head, WINDOW, DOCUMENTS, DROPOUT
    )
    queries = _rows(q, m_first, q_s, length, WIDTH, True, BLOCK_M, BLOCK_D)
    low, whole_low, whole_high, high = _key_range(
        m_first, length, window, starts, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N
    )
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    o, total, largest = _attend(
        o, total, largest, queries, k, v, k_s, v_s, low, whole_low, whole_high, high, m, first,
        row_key, scale, length, last_kept, False, WINDOW or DOCUMENTS, DROPOUT, PRECISION, WIDTH,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    o, total, largest = _attend(
        o, total, largest, queries, k, v, k_s, v_s, low, whole_low, whole_high, high, m, first,
        row_key, scale, length, last_kept, True, WINDOW or DOCUMENTS, DROPOUT, PRECISION, WIDTH,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    o *= (keep_scale / total)[:, None]
    _store_rows(out + b * out_b + head * out_h, o, m_first, out_s, length, WIDTH, BLOCK_M, BLOCK_D)
    tl.store(lse + row * length + m, largest + tl.log2(total), m < length)


def variants() -> Iterator[Variant]:
    """See `specimens`."""
    for specimen in specimens("forward"):
        yield specimen.variant(
            _attention_forward,
            signature(specimen.dtype, "q", "k", "v", "out")
            | {"lse": "*fp32", "keep_scale": "fp32"}
            | strides_of("q", "k", "v", "out"),
        )
