"""Causal attention: softmax(q k^T / sqrt(D)) v, where query m looks at keys n <= m.

    p = softmax(s),  s = scale q k^T;    o = (keep / (1 - dropout) p) v
    dv = (keep / (1 - dropout) p)^T do;  dp = keep / (1 - dropout) (do v^T)
    ds = p (dp - delta),  delta = sum over the width of do o;    dq = scale ds k,  dk = scale ds^T q

Flash attention (Dao et al. 2022; the two passes of the backward as in Dao 2023): scores are made
block by block, and again in the backward pass, from the log-sum-exp of each query; no [S, S] tensor
is in memory. Keys can be limited to a window of the last positions and to the query's document.
Each gradient's sum is one program's, blocks in order, so a run's bits do not depend on timing.

FLOPs of a causal head: 2 S^2 D forward, 7 S^2 D backward (scores and dp are made in both passes).
Memory moved for it: q, o and a share of k and v forward, twice that and four gradients backward;
with as many key/value heads as query heads that is S / 4 FLOPs a byte in bfloat16, so that from
S = 1200 on the matrix units of an H100 (295 FLOPs for a byte of its memory) are what limits it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from megapipe.kernels.attention_backward_keys import _attention_backward_keys
from megapipe.kernels.attention_backward_queries import (
    _attention_backward_queries,
    _attention_delta,
)
from megapipe.kernels.attention_forward import _attention_forward
from megapipe.kernels.attention_settings import PRECISION, Kernel, architecture_of, launch
from megapipe.kernels.backend import Backend, UnsupportedError, check_dtype, choose
from megapipe.kernels.dropout import attention_dropout_mask, last_kept

MAX_HEAD_DIM = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    bounds_2BS: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: int = 0,
    samples_B: Tensor | None = None,
    first_head: int = 0,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """q [B, N, S, D], k and v [B, K, S, D] -> [B, N, S, D], by Triton as [S, B, N, D] in memory.

    N is a multiple of K: query heads share key/value heads in order. Any strides but in D. `window`
    is how many of the last keys a query sees, its own position included; `bounds_2BS` is what
    `document_bounds` gives; `mask`, what `attention_mask` gives for both, spares torch making and
    keeping one in each of several layers, and is nothing to Triton. Dropout keeps the probabilities
    that `attention_dropout_mask` says for (dropout_key, samples_B [B], head `first_head` + n).
    `scale` is D^(-1/2) unless given. Products are float32 sums, of float32 inputs not rounded. In
    torch, k and v may be longer than q, whose positions are then the last (a key/value cache).
    Raises UnsupportedError in Triton for that, for heads wider than 256, for a scale that is not
    positive, and for float64.
    """
    assert 0 <= dropout < 1, dropout
    assert window is None or window > 0, window
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    masks = (window, bounds_2BS, dropout, dropout_key, samples_B, first_head)
    if choose(backend, q) == "torch":
        if mask is None:
            mask = attention_mask(q.shape[2], k.shape[2], window, bounds_2BS, q.device)
        return _reference(q, k, v, scale, mask, dropout, dropout_key, samples_B, first_head)
    out: Tensor = torch.ops.megapipe.attention(q, k, v, scale, *masks)[0]
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
    scale: float,
    mask: Tensor | None,
    dropout: float,
    dropout_key: int,
    samples_B: Tensor | None,
    first_head: int,
) -> Tensor:
    """torch's scaled_dot_product_attention, and with dropout the formula itself, probabilities in
    memory: torch would draw the mask from a generator, which differs by layout."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if dropout > 0 or (mask is not None and q.is_cuda):
        # No fused kernel of torch takes a mask and unequal head counts together: given both, it
        # would fall back to one that holds all probabilities, [B, N, S, S].
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    if dropout == 0:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=heads != k.shape[1],
        )
    assert samples_B is not None
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT) * scale
    probabilities = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    kept = attention_dropout_mask(
        dropout,
        dropout_key,
        samples_B,
        heads=range(first_head, first_head + heads),
        length=q.shape[2],
    )
    return (probabilities * kept.to(q.dtype) / (1 - dropout)) @ v


def _masks(
    window: int | None,
    bounds_2BS: Tensor | None,
    dropout: float,
    dropout_key: int,
    samples_B: Tensor | None,
    first_head: int,
    length: int,
) -> dict[str, Any]:
    """Arguments that say what each query sees and what dropout keeps, by name."""
    windowed = window is not None and window < length
    if bounds_2BS is not None:
        assert bounds_2BS.dtype == torch.int32, bounds_2BS.dtype
        assert bounds_2BS.shape[2] == length, bounds_2BS.shape
        bounds_2BS = bounds_2BS.contiguous()
    if dropout > 0:
        assert samples_B is not None, "samples_B are needed where there is dropout"
        samples_B = samples_B.contiguous()
    return {
        "bounds": bounds_2BS,
        "samples": samples_B,
        "window": window if windowed else 0,
        "key": dropout_key,
        "first_head": first_head,
        "last_kept": last_kept(dropout),
        "WINDOW": windowed,
        "DOCUMENTS": bounds_2BS is not None,
        "DROPOUT": dropout > 0,
        "PRECISION": PRECISION,
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"{name}_{dim}": stride
        for name, x in tensors.items()
        for dim, stride in zip("bhs", x.stride()[:3], strict=True)
    }


def _blocks(kernel: Kernel, x: Tensor, masks: dict[str, Any]) -> dict[str, Any]:
    masked = masks["WINDOW"] or masks["DOCUMENTS"] or masks["DROPOUT"]
    architecture = architecture_of(x.device)
    blocks, options = launch(kernel, x.shape[3], x.element_size(), architecture, masked)
    return blocks | options


def _programs(x: Tensor, block: int) -> tuple[int]:
    """One for each so many rows of each of the heads of x."""
    return (triton.cdiv(x.shape[2], block) * x.shape[0] * x.shape[1],)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    check_dtype("attention", q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise UnsupportedError("attention", f"dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[3] > MAX_HEAD_DIM:
        raise UnsupportedError("attention", f"heads of width {q.shape[3]} are above {MAX_HEAD_DIM}")
    if k.shape[2] != q.shape[2]:
        raise UnsupportedError("attention", f"{k.shape[2]} keys for {q.shape[2]} queries")
    if not scale > 0:  # the largest score is looked for before they are scaled
        raise UnsupportedError("attention", f"scale {scale} is not positive")
    assert k.shape == v.shape, (k.shape, v.shape)
    assert q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)
    for x in (q, k, v):
        if not _takes(x):
            raise UnsupportedError("attention", f"strides {x.stride()}")


def _takes(x: Tensor) -> bool:
    """Its rows are contiguous, and 32 bits hold a place within a block of them."""
    return x.numel() == 0 or ((x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) < 2**23)


def _like_attention(q: Tensor) -> Tensor:
    """[B, N, S, D], in memory [S, B, N, D]."""
    batch, heads, length, width = q.shape
    return q.new_empty((length, batch, heads, width)).permute(1, 2, 0, 3)


@torch.library.custom_op("megapipe::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    bounds_2BS: Tensor | None,
    dropout: float,
    dropout_key: int,
    samples_B: Tensor | None,
    first_head: int,
) -> tuple[Tensor, Tensor]:
    """(output, log2-sum-exp2 of the scores [B, N, S])."""
    _check(q, k, v, scale)
    out, lse = _like_attention(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    masks = _masks(window, bounds_2BS, dropout, dropout_key, samples_B, first_head, q.shape[2])
    blocks = _blocks("forward", q, masks)
    if q.numel():
        _attention_forward[_programs(q, blocks["BLOCK_M"])](
            q=q,
            k=k,
            v=v,
            out=out,
            lse=lse,
            scale=scale / math.log(2),
            heads=q.shape[1],
            group=q.shape[1] // k.shape[1],
            length=q.shape[2],
            keep_scale=1 / (1 - dropout),
            **masks,
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
    scale: float,
    window: int | None,
    bounds_2BS: Tensor | None,
    dropout: float,
    dropout_key: int,
    samples_B: Tensor | None,
    first_head: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (_like_attention(x) for x in (q, k, v))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    batch, heads, length, _ = q.shape
    grad_out = grad_out if _takes(grad_out) else grad_out.contiguous()
    delta = torch.empty_like(lse)
    masks = _masks(window, bounds_2BS, dropout, dropout_key, samples_B, first_head, length)
    blocks = _blocks("delta", q, masks)
    _attention_delta[_programs(q, blocks["BLOCK_M"])](
        out=out,
        grad_out=grad_out,
        delta=delta,
        heads=heads,
        length=length,
        kept_share=1 - dropout,
        **_strides(out=out, grad=grad_out),
        **blocks,
    )
    common = masks | {"grad_out": grad_out, "lse": lse, "delta": delta, "q": q, "k": k, "v": v}
    common |= {"heads": heads, "group": heads // k.shape[1], "length": length}
    common |= {"scale": scale / math.log(2), "grad_scale": scale / (1 - dropout)}
    common |= _strides(q=q, k=k, v=v, grad=grad_out)
    blocks = _blocks("queries", q, masks)
    _attention_backward_queries[_programs(q, blocks["BLOCK_M"])](
        grad_q=grad_q, **common, **_strides(grad_q=grad_q), **blocks
    )
    blocks = _blocks("keys", q, masks)
    _attention_backward_keys[_programs(k, blocks["BLOCK_N"])](
        grad_k=grad_k,
        grad_v=grad_v,
        batch=batch,
        keep_scale=1 / (1 - dropout),
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
    q, k, v, ctx.scale, ctx.window, bounds_2BS, ctx.dropout, ctx.key, samples_B, first_head = inputs
    out, lse = output
    ctx.first_head = first_head
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, bounds_2BS, samples_B)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 10
    *tensors, bounds_2BS, samples_B = ctx.saved_tensors
    masks = (ctx.window, bounds_2BS, ctx.dropout, ctx.key, samples_B, ctx.first_head)
    grads = _backward(grad_out, *tensors, ctx.scale, *masks)
    return (*grads, *[None] * 7)


_forward.register_autograd(_differentiate, setup_context=_set_up)
