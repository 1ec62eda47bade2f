"""Causal attention: softmax(q k^T / sqrt(D)) v, where query m looks at keys n <= m.

    p = softmax(s),  s = scale q k^T;    o = (keep / (1 - dropout) p) v
    dv = (keep / (1 - dropout) p)^T do;  dp = keep / (1 - dropout) (do v^T)
    ds = p (dp - delta),  delta = sum over the width of do o;    dq = scale ds k,  dk = scale ds^T q

Flash attention (Dao et al. 2022; the two passes of the backward as in Dao 2023): scores are made
block by block, and again in the backward pass, from the log-sum-exp of each query; no [S, S] tensor
is in memory. Keys can be limited to a window of the last positions and to the query's document.
Each gradient's sum is one program's, blocks in order, so a run's bits do not depend on timing.

FLOPs of a causal head: 2 S^2 D forward, 7 S^2 D backward (scores and dp are made in both passes).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from megapipe.kernels.attention_kernels import (
    _attention_backward_keys,
    _attention_backward_queries,
    _attention_delta,
    _attention_forward,
)
from megapipe.kernels.backend import FP_FUSION, Backend, UnsupportedError, check_dtype, choose
from megapipe.kernels.dropout import attention_dropout_mask, last_kept

MAX_HEAD_DIM = 256
DELTA_ROWS, DELTA_WARPS = 64, 4


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    bounds_2BS: Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: int = 0,
    samples_B: Tensor | None = None,
    first_head: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """q [B, N, S, D], k and v [B, K, S, D] -> [B, N, S, D], laid out in memory as [S, B, N, D].

    N is a multiple of K: query heads share key/value heads in order. Any strides but in D. `window`
    is how many of the last keys a query sees, its own position included; `bounds_2BS` is what
    `document_bounds` gives. Dropout keeps the probabilities that `attention_dropout_mask` says for
    (dropout_key, samples_B [B], head `first_head` + n). In torch, k and v may be longer than q,
    whose positions are then the last (a key/value cache). Raises UnsupportedError in Triton for
    that, for heads wider than 256, and for float64.
    """
    if choose(backend, q) == "torch":
        return _reference(q, k, v, window, bounds_2BS, dropout, dropout_key, samples_B, first_head)
    out, _ = torch.ops.megapipe.attention(
        q, k, v, window, bounds_2BS, dropout, dropout_key, samples_B, first_head
    )
    return out


def document_bounds(documents_BS: Tensor) -> Tensor:
    """[2, B, S] int32: for each token the first position of its document and the one after its
    last. A document's tokens are next to each other and have one number."""
    length = documents_BS.shape[1]
    positions = torch.arange(length, device=documents_BS.device).expand_as(documents_BS)
    changes = documents_BS[:, 1:] != documents_BS[:, :-1]
    begins = F.pad(changes, (1, 0), value=True)
    ends = F.pad(changes, (0, 1), value=True)
    first = torch.where(begins, positions, 0).cummax(dim=1).values
    after = torch.where(ends, positions + 1, length).flip(1).cummin(dim=1).values.flip(1)
    return torch.stack([first, after]).int()


def attention_mask(
    queries: int,
    keys: int,
    window: int | None,
    bounds_2BS: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """True where a query (row) may see a key (column): [queries, keys], or [B, 1, queries, keys]
    with documents; None: plain causal. The queries are the last positions."""
    offset = keys - queries
    windowed = window is not None and window < keys
    if bounds_2BS is None and not windowed and offset == 0:
        return None
    query = torch.arange(offset, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    mask = key <= query
    if window is not None:
        mask &= query - key < window
    if bounds_2BS is not None:
        return mask & (key >= bounds_2BS[0, :, None, offset:, None])
    return mask


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    bounds_2BS: Tensor | None,
    dropout: float,
    dropout_key: int,
    samples_B: Tensor | None,
    first_head: int,
) -> Tensor:
    """torch's scaled_dot_product_attention, and with dropout the formula itself, probabilities in
    memory: torch would draw the mask from a generator, which differs by layout."""
    heads, kv_heads = q.shape[1], k.shape[1]
    mask = attention_mask(q.shape[2], k.shape[2], window, bounds_2BS, q.device)
    if dropout > 0 or (mask is not None and q.is_cuda):
        # No fused kernel of torch takes a mask and unequal head counts together: given both, it
        # would fall back to one that holds all probabilities, [B, N, S, S].
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    if dropout == 0:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != k.shape[1]
        )
    assert samples_B is not None
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    probabilities = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    kept = attention_dropout_mask(
        dropout,
        dropout_key,
        samples_B,
        heads=range(first_head, first_head + heads),
        length=q.shape[2],
    )
    return (probabilities * kept.to(q.dtype) / (1 - dropout)) @ v


class Settings(NamedTuple):
    """Queries and keys in a block, warps, stages of the pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


def _settings(kernel: str, block_d: int, element_size: int, is_amd: bool) -> Settings:
    """Of "forward", "queries" or "keys" (the gradients of), by head width and dtype: fixed, so that
    all ranks and runs have the same bits."""
    if element_size == 4:
        return Settings(32, 32, 4, 1)
    stages = 1 if is_amd else 2
    narrow = {
        "forward": Settings(128, 64, 8, stages),
        "queries": Settings(64, 64, 8, stages),
        "keys": Settings(64, 64, 8, stages),
    }
    wide = {
        "forward": Settings(64, 32, 8, stages),
        "queries": Settings(64, 32, 8, stages),
        "keys": Settings(32, 64, 8, stages),
    }
    return (narrow if block_d <= 128 else wide)[kernel]


def _common(
    q: Tensor,
    k: Tensor,
    window: int | None,
    bounds_2BS: Tensor | None,
    dropout: float,
    dropout_key: int,
    samples_B: Tensor | None,
    first_head: int,
) -> dict[str, Any]:
    """Arguments that all three kernels take, by name."""
    heads, length, width = q.shape[1:]
    windowed = window is not None and window < length
    return {
        # Without documents never read, but added to.
        "bounds": q.new_empty(0, dtype=torch.int32) if bounds_2BS is None else bounds_2BS,
        "samples": samples_B if dropout > 0 else None,
        "scale": width**-0.5 / math.log(2),
        "heads": heads,
        "group": heads // k.shape[1],
        "length": length,
        "width": width,
        "window": window if windowed else 0,
        "key": dropout_key,
        "first_head": first_head,
        "last_kept": last_kept(dropout),
        "keep_scale": 1 / (1 - dropout),
        "WINDOW": windowed,
        "DOCUMENTS": bounds_2BS is not None,
        "DROPOUT": dropout > 0,
        "PRECISION": "ieee",  # of float32 inputs: as exact as torch's
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"{name}_{dim}": stride
        for name, x in tensors.items()
        for dim, stride in zip("bhs", x.stride()[:3], strict=True)
    }


def _blocks(kernel: str, q: Tensor) -> tuple[Settings, dict[str, Any]]:
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    settings = _settings(kernel, block_d, q.element_size(), torch.version.hip is not None)
    return settings, {
        "BLOCK_M": settings.queries,
        "BLOCK_N": settings.keys,
        "BLOCK_D": block_d,
        "num_warps": settings.warps,
        "num_stages": settings.stages,
        "enable_fp_fusion": FP_FUSION,
    }


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_dtype("attention", q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise UnsupportedError("attention", f"dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[3] > MAX_HEAD_DIM:
        raise UnsupportedError("attention", f"heads of width {q.shape[3]} are above {MAX_HEAD_DIM}")
    if k.shape[2] != q.shape[2]:
        raise UnsupportedError("attention", f"{k.shape[2]} keys for {q.shape[2]} queries")
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    assert all(x.stride(3) == 1 or x.shape[3] == 1 or x.numel() == 0 for x in (q, k, v))


def _like_attention(q: Tensor) -> Tensor:
    """[B, N, S, D], in memory [S, B, N, D]."""
    batch, heads, length, width = q.shape
    return q.new_empty((length, batch, heads, width)).permute(1, 2, 0, 3)


@torch.library.custom_op("megapipe::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    bounds_2BS: Tensor | None,
    dropout: float,
    dropout_key: int,
    samples_B: Tensor | None,
    first_head: int,
) -> tuple[Tensor, Tensor]:
    """(output, log2-sum-exp2 of the scores [B, N, S])."""
    _check(q, k, v)
    batch, heads, length, _ = q.shape
    out, lse = _like_attention(q), q.new_empty((batch, heads, length), dtype=torch.float32)
    settings, blocks = _blocks("forward", q)
    if q.numel():
        _attention_forward[(triton.cdiv(length, settings.queries), batch * heads)](
            q=q,
            k=k,
            v=v,
            out=out,
            lse=lse,
            **_common(q, k, window, bounds_2BS, dropout, dropout_key, samples_B, first_head),
            **_strides(q=q, k=k, v=v, out=out),
            **blocks,
        )
    return out, lse


@torch.library.custom_op("megapipe::attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int | None,
    bounds_2BS: Tensor | None,
    dropout: float,
    dropout_key: int,
    samples_B: Tensor | None,
    first_head: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, width = q.shape
    grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
    grad_q, grad_k, grad_v = (_like_attention(x) for x in (q, k, v))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    delta = torch.empty_like(lse)
    common = _common(q, k, window, bounds_2BS, dropout, dropout_key, samples_B, first_head)
    _attention_delta[(triton.cdiv(length, DELTA_ROWS), batch * heads)](
        out=out,
        grad_out=grad_out,
        delta=delta,
        heads=heads,
        length=length,
        width=width,
        **_strides(out=out, grad=grad_out),
        BLOCK_M=DELTA_ROWS,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        num_warps=DELTA_WARPS,
        enable_fp_fusion=FP_FUSION,
    )
    common |= {"grad_out": grad_out, "lse": lse, "delta": delta, "q": q, "k": k, "v": v}
    common |= {"natural_scale": width**-0.5} | _strides(q=q, k=k, v=v, grad=grad_out)
    settings, blocks = _blocks("queries", q)
    _attention_backward_queries[(triton.cdiv(length, settings.queries), batch * heads)](
        grad_q=grad_q, **common, **_strides(grad_q=grad_q), **blocks
    )
    settings, blocks = _blocks("keys", q)
    _attention_backward_keys[(triton.cdiv(length, settings.keys), batch * k.shape[1])](
        grad_k=grad_k,
        grad_v=grad_v,
        batch=batch,
        **common,
        **_strides(grad_k=grad_k),
        **blocks,
    )
    return grad_q, grad_k, grad_v


@_forward.register_fake
def _(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _like_attention(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return _like_attention(q), _like_attention(k), _like_attention(v)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.window, bounds_2BS, ctx.dropout, ctx.key, samples_B, ctx.first_head = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, bounds_2BS, samples_B)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    *tensors, bounds_2BS, samples_B = ctx.saved_tensors
    grads = _backward(
        grad_out,
        *tensors,
        ctx.window,
        bounds_2BS,
        ctx.dropout,
        ctx.key,
        samples_B,
        ctx.first_head,
    )
    return (*grads, *[None] * 6)


_forward.register_autograd(_differentiate, setup_context=_set_up)
