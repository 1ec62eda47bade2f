"""Errors for test_planted_errors.py: in attention and rotary positions."""

from typing import Any

import torch

from tests.kernels.planted import OwnTest, Planted

SMALL: dict[str, Any] = {
    "batch": 1,
    "group": 1,
    "kv_heads": 1,
    "length": 16,
    "width": 8,
    "dtype": torch.float32,
    "window": None,
    "packed": False,
    "dropout": {},
}
"""One block of keys, half a block of queries or one: masks cut through it."""


def attended(**differences: Any) -> OwnTest:
    return OwnTest("test_attention", "test_as_accurate_as_torch", SMALL | differences)


CAUSAL = attended()
EDGES = attended(length=20)
WHOLE_BLOCKS = attended(length=50)
TWO_QUERY_HEADS = attended(group=2)
FOUR_QUERY_HEADS = attended(group=2, kv_heads=2)
WINDOW = attended(window=7)
DOCUMENTS = attended(packed=True)
TWO_SAMPLES = attended(packed=True, batch=2)
DROPOUT = attended(dropout={"dropout": 0.3, "dropout_key": 5, "first_head": 3})
ANY_ORDER = OwnTest("test_attention", "test_any_order")

FORWARD = [
    Planted("off by one in the causal mask", "attention_forward", {"n <= m\n": "n < m\n"}, CAUSAL),
    Planted(
        "a block of keys that the mask cuts counts as whole",
        "attention_forward",
        {"(m_first + 1) // BLOCK_N * BLOCK_N": "(m_first + BLOCK_M) // BLOCK_N * BLOCK_N"},
        WHOLE_BLOCKS,
    ),
    Planted(
        "off by one in the window",
        "attention_forward",
        {"first = tl.maximum(first, m - window + 1)": "first = tl.maximum(first, m - window)"},
        WINDOW,
    ),
    Planted(
        "a query looks beyond its document",
        "attention_forward",
        {
            "first = tl.load(starts + m, m < length, other=0)": "first = tl.load(starts + m, "
            "m < length, other=0) - 1"
        },
        DOCUMENTS,
    ),
    Planted(
        "documents are those of the first sample",
        "attention_forward",
        {"starts = bounds + b * length": "starts = bounds"},
        TWO_SAMPLES,
    ),
    Planted(
        "no mask at the last rows",
        "attention_forward",
        {
            "return tl.load(places, (first + row < length) & (column < WIDTH), other=0)": (
                "return tl.load(places, (row >= 0) & (column < WIDTH), other=0)"
            )
        },
        EDGES,
    ),
    Planted(
        "query heads share key heads in the wrong order",
        "attention_forward",
        {"k += b * k_b + head // group * k_h": "k += b * k_b + head % (heads // group) * k_h"},
        FOUR_QUERY_HEADS,
    ),
    Planted(
        "the sum so far is not rescaled when the maximum grows",
        "attention_forward",
        {"total = total * shrink + tl.sum(p, 1)": "total = total + tl.sum(p, 1)"},
        WHOLE_BLOCKS,
    ),
    Planted(
        "1 / (1 - p) dropped", "attention_forward", {"(keep_scale / total)": "(1 / total)"}, DROPOUT
    ),
    Planted(
        "dropout before the sum of probabilities",
        "attention_forward",
        {
            "        total = total * shrink + tl.sum(p, 1)\n": "",
            "        values = _rows(v": "        total = total * shrink + tl.sum(p, 1)\n"
            "        values = _rows(v",
        },
        DROPOUT,
    ),
    Planted(
        "a rank's first head ignored in dropout",
        "attention_forward",
        {"_head_key(samples, b, first_head + head, key)": "_head_key(samples, b, head, key)"},
        DROPOUT,
    ),
    Planted(
        "race: sums of a head's last block are stored in the next head's place",
        "attention_forward",
        {
            "largest + tl.log2(total), m < length)": "largest + tl.log2(total), "
            "row * length + m < tl.num_programs(0) // blocks * length)"
        },
        ANY_ORDER,
    ),
]

BACKWARD = [
    Planted(
        "wrong sign",
        "attention_backward_queries",
        {"ds = p * (dp - delta[:, None])": "ds = p * (dp + delta[:, None])"},
        CAUSAL,
    ),
    Planted(
        "dropout forgotten",
        "attention_backward_queries",
        {"dp = tl.where(_kept(row_key[:, None], n[None, :], last_kept), dp, 0.0)": "pass"},
        DROPOUT,
    ),
    Planted(
        "1 - p dropped in the row sums",
        "attention_backward_queries",
        {"do.to(tl.float32), 1) * kept_share": "do.to(tl.float32), 1)"},
        DROPOUT,
    ),
    Planted(
        "no mask where the log-sum-exp is loaded",
        "attention_backward_queries",
        {"tl.load(lse + row * length + m, m < length, other=0)": "tl.load(lse + row * length + m)"},
        EDGES,
    ),
    Planted(
        "query heads share value heads in the wrong order",
        "attention_backward_queries",
        {"v += b * v_b + head // group * v_h": "v += b * v_b + head % (heads // group) * v_h"},
        FOUR_QUERY_HEADS,
    ),
    Planted(
        "wrong sign",
        "attention_backward_keys",
        {"ds = p * (dp - d[None, :])": "ds = p * (dp + d[None, :])"},
        CAUSAL,
    ),
    Planted(
        "no mask where the row sums are loaded",
        "attention_backward_keys",
        {
            "tl.load(delta + member * length + m, inside, other=0)": (
                "tl.load(delta + member * length + m)"
            )
        },
        EDGES,
    ),
    Planted(
        "only one query head's share",
        "attention_backward_keys",
        {"range(group * count)": "range(count)"},
        TWO_QUERY_HEADS,
    ),
    Planted(
        "the log-sum-exp of the group's first head for all",
        "attention_backward_keys",
        {"tl.load(lse + member * length + m, inside": "tl.load(lse + m, inside"},
        TWO_QUERY_HEADS,
    ),
    Planted(
        "off by one in the causal mask",
        "attention_backward_keys",
        {"seen = m[None, :] >= n[:, None]": "seen = m[None, :] > n[:, None]"},
        CAUSAL,
    ),
    Planted(
        "off by one in the window",
        "attention_backward_keys",
        {"after = tl.minimum(after, n + window)": "after = tl.minimum(after, n + window + 1)"},
        WINDOW,
    ),
    Planted(
        "a block of queries that the mask cuts counts as whole",
        "attention_backward_keys",
        {"tl.cdiv(n_last, BLOCK_M) * BLOCK_M": "n_last // BLOCK_M * BLOCK_M"},
        WHOLE_BLOCKS,
    ),
    Planted(
        "documents begin where they should end",
        "attention_backward_keys",
        {"ends += (b + batch) * length": "ends += b * length"},
        DOCUMENTS,
    ),
    Planted(
        "1 / (1 - p) dropped in the gradient of values",
        "attention_backward_keys",
        {"dv * keep_scale": "dv"},
        DROPOUT,
    ),
    Planted(
        "scale dropped in the gradients of queries and keys",
        "attention",
        {'"grad_scale": scale / (1 - dropout)': '"grad_scale": 1 / (1 - dropout)'},
        CAUSAL,
    ),
]

ROPE_INPUTS: dict[str, Any] = {
    "shape": (2, 2),
    "group": 3,
    "kv_heads": 1,
    "half": 3,
    "dtype": torch.float32,
    "packed": True,
}
ROPE = OwnTest("test_rope", "test_as_accurate_as_torch", ROPE_INPUTS)
NORM_ROPE = OwnTest("test_norm_rope", "test_as_accurate_as_torch", ROPE_INPUTS)
NORM_ROPE_PROGRAMS = OwnTest(
    "test_norm_rope", "test_more_tokens_than_programs_and_heads_than_a_tile"
)

ROPES = [
    Planted("wrong sign in the backward pass", "rope", {"d = -d": "d = d"}, ROPE),
    Planted(
        "wrong sign in the second half",
        "rope",
        {"turned_b = b * cos + a * sin": "turned_b = b * cos - a * sin"},
        ROPE,
    ),
    Planted(
        "no mask at the last head",
        "rope",
        {"inside = (head < heads) & (column < half)": "inside = column < half"},
        ROPE,
    ),
    Planted(
        "a token's position is that of its place in the sequence",
        "rope",
        {"tl.load(positions + token)": "tl.load(positions + s)"},
        ROPE,
    ),
    Planted(
        "as many key heads as query heads",
        "rope",
        {"k_h, out_k_h, kv_heads, half, c,": "k_h, out_k_h, heads, half, c,"},
        ROPE,
    ),
    Planted(
        "wrong sign in the norm's backward pass",
        "norm_rope",
        {"(d_a - a * mean)": "(d_a + a * mean)"},
        NORM_ROPE,
    ),
    Planted(
        "the gradient is turned as the values were",
        "norm_rope",
        {"d_b = g_b * c - g_a * s": "d_b = g_b * c + g_a * s"},
        NORM_ROPE,
    ),
    Planted(
        "the mean of squares over half of a head",
        "norm_rope",
        {
            "a, b = _halves(x + _far(head, x_head), column, inside, half)\n"
            "        r = _scale(a, b, 2 * half, epsilon)\n"
            "        a = a": "a, b = _halves(x + _far(head, x_head), column, inside, half)\n"
            "        r = _scale(a, b, half, epsilon)\n"
            "        a = a"
        },
        NORM_ROPE,
    ),
    Planted(
        "no mask where the weights' gradients are stored",
        "norm_rope",
        {"tl.store(row + 3 * half, k_w_b, columns < half)": "tl.store(row + 3 * half, k_w_b)"},
        NORM_ROPE,
    ),
    Planted(
        "keys are as far apart as queries where they are stored",
        "norm_rope",
        {"y_k + token * kv_heads * width, k_weight": "y_k + token * heads * width, k_weight"},
        NORM_ROPE,
    ),
    Planted(
        "race: programs add to one sum of the weights' gradients",
        "norm_rope",
        {
            "q.new_empty((programs, 2 * width)": "q.new_zeros((programs, 2 * width)",
            "row = partial + program.to(tl.int64) * 4 * half + columns": "row = partial + columns",
            "tl.store(row, q_w_a": "tl.atomic_add(row, q_w_a",
            "tl.store(row + half": "tl.atomic_add(row + half",
            "tl.store(row + 2 * half": "tl.atomic_add(row + 2 * half",
            "tl.store(row + 3 * half": "tl.atomic_add(row + 3 * half",
        },
        NORM_ROPE_PROGRAMS,
    ),
]
