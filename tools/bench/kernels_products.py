"""Cases with matrix products or whole vocabularies: losses, attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megapipe.kernels.examples import products as examples
from megapipe.kernels.examples.example import LayerShape
from megapipe.kernels.linear_cross_entropy import row_parts
from megapipe.tools.bench.kernels_cases import Case, Work
from megapipe.tools.bench.kernels_elementwise import at_least_float32, narrow, wide

TARGET = 8  # bytes

# --- Cross-entropy -------------------------------------------------------------------------------


def _loss_eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (F.cross_entropy(at_least_float32(logits), targets, reduction="sum"),)


def _loss_liger(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return (liger_cross_entropy(logits, targets, reduction="sum"),)


def _loss_forward(shape: LayerShape) -> Work:
    elements = shape.tokens * shape.vocab
    moved = {
        "logits": elements * narrow,
        "targets": shape.tokens * TARGET,
        "maximum, sum, target's logit": 3 * shape.tokens * wide,
    }
    return Work(moved, 4 * elements)  # maximum, difference, exp, sum


def _loss_backward(shape: LayerShape) -> Work:
    elements = shape.tokens * shape.vocab
    moved = {
        "logits": elements * narrow,
        "gradient": elements * narrow,
        "targets": shape.tokens * TARGET,
        "maximum, log-sum-exp, share": 3 * shape.tokens * wide,
    }
    return Work(moved, 4 * elements)  # difference, exp, share, dloss


CROSS_ENTROPY = Case(
    examples.CROSS_ENTROPY,
    bound="memory",
    eager=_loss_eager,
    liger=_loss_liger,
    forward=_loss_forward,
    backward=_loss_backward,
)


def _linear_eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return _loss_eager(hidden @ weight.t(), targets)


def _linear_liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return (liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum"),)


def _linear_forward(shape: LayerShape) -> Work:
    parts, logits = len(row_parts(shape.tokens)), shape.tokens * shape.vocab
    moved = {
        "h": shape.tokens * shape.hidden * narrow,
        "W, for each part of the rows": parts * shape.vocab * shape.hidden * narrow,
        "logits, written and read": 2 * logits * narrow,
    }
    return Work(moved, 2 * logits * shape.hidden)


def _linear_backward(shape: LayerShape) -> Work:
    parts, logits = len(row_parts(shape.tokens)), shape.tokens * shape.vocab
    weights = shape.vocab * shape.hidden
    moved = {
        "logits to gradient": 2 * logits * narrow,
        "gradient, for both products": 2 * logits * narrow,
        "W, for each part of the rows": parts * weights * narrow,
        "h, dh": 2 * shape.tokens * shape.hidden * narrow,
        "dW, read and written for each part": parts * 2 * weights * wide,
        "dW, scaled and rounded": weights * (wide + narrow),
        "dh, scaled": 2 * shape.tokens * shape.hidden * narrow,
    }
    return Work(moved, 4 * logits * shape.hidden)


LINEAR_CROSS_ENTROPY = Case(
    examples.LINEAR_CROSS_ENTROPY,
    bound="matmul",
    eager=_linear_eager,
    liger=_linear_liger,
    forward=_linear_forward,
    backward=_linear_backward,
)

# --- Attention -----------------------------------------------------------------------------------


def _attention_eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The formula, scores in memory."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    length = q.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    wide_scores = at_least_float32(scores.masked_fill(later, -torch.inf))
    return (wide_scores.softmax(-1).to(q.dtype) @ v,)


def _attention_forward(shape: LayerShape) -> Work:
    queries = shape.tokens * shape.heads * shape.head_dim
    keys = shape.tokens * shape.kv_heads * shape.head_dim
    moved = {
        "q": queries * narrow,
        "k, v": 2 * keys * narrow,
        "o": queries * narrow,
        "log-sum-exp": shape.tokens * shape.heads * wide,
    }
    return Work(moved, 2 * queries * shape.sequence)  # two products, half of each masked


def _attention_backward(shape: LayerShape) -> Work:
    """FLOPs of five products, as speeds of attention are usually given; our two passes take seven
    (scores and do v^T in each)."""
    queries = shape.tokens * shape.heads * shape.head_dim
    keys = shape.tokens * shape.kv_heads * shape.head_dim
    moved = {
        "q, k, v, in two passes": 2 * (queries + 2 * keys) * narrow,
        "do, in three passes": 3 * queries * narrow,
        "o, for delta": queries * narrow,
        "log-sum-exp and delta": 5 * shape.tokens * shape.heads * wide,
        "dq": queries * narrow,
        "dk, dv": 2 * keys * narrow,
    }
    return Work(moved, 5 * queries * shape.sequence)


ATTENTION = Case(
    examples.ATTENTION,
    bound="matmul",
    eager=_attention_eager,
    forward=_attention_forward,
    backward=_attention_backward,
)

CASES = (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, ATTENTION)
