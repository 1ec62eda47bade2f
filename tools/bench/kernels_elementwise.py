"""Cases that memory bounds: norms, activations, rotary positions, dropout.

In the formulae of work: `narrow` is the 2 bytes of bfloat16, `wide` the 4 of float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megapipe.kernels.dropout import keep_mask
from megapipe.kernels.examples import elementwise as examples
from megapipe.kernels.examples.elementwise import DROPOUT, EPSILON, KEY
from megapipe.kernels.examples.example import LayerShape
from megapipe.kernels.gelu import _backward_grid as gelu_groups
from megapipe.kernels.row_tiles import row_tiles
from megapipe.tools.bench.kernels_cases import Case, Work

narrow, wide = 2, 4


def at_least_float32(x: Tensor) -> Tensor:
    """`.float()`, but float64 stays what it is."""
    return x if x.dtype == torch.float64 else x.float()


# --- Norms ---------------------------------------------------------------------------------------


def _rms_eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """As transformers writes it."""
    total = x + residual
    h = at_least_float32(total)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight * h.to(x.dtype), total


def _rms_liger(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    y, total = liger_fused_add_rms_norm(x, residual, weight, EPSILON, in_place=False)
    return y, total


def _norm_forward(shape: LayerShape, vectors: int, statistics: int, flops: int) -> Work:
    elements = shape.tokens_part * shape.hidden
    return Work(
        {
            "x, residual": 2 * elements * narrow,
            "weight (and bias)": vectors * shape.hidden * narrow,
            "y, x + residual": 2 * elements * narrow,
            "statistics of rows": statistics * shape.tokens_part * wide,
        },
        flops * elements,
    )


def _norm_backward(shape: LayerShape, vectors: int, statistics: int, flops: int) -> Work:
    elements = shape.tokens_part * shape.hidden
    groups = row_tiles("rms_norm", shape.hidden, 8192).backward_grid(shape.tokens_part)[1]
    return Work(
        {
            "dy, d(x + residual)": 2 * elements * narrow,
            "x + residual": elements * narrow,
            "weight": shape.hidden * narrow,
            "statistics of rows": statistics * shape.tokens_part * wide,
            "dx, also the residual's": elements * narrow,
            "partial sums, written and read": vectors * 2 * groups * shape.hidden * wide,
            "dw (and db)": vectors * shape.hidden * narrow,
        },
        flops * elements,
    )


RMS_NORM = Case(
    examples.RMS_NORM,
    bound="memory",
    eager=_rms_eager,
    liger=_rms_liger,
    # +, square, sum, r, w; backward s r, w dy, two sums of products, the difference, r, +.
    forward=lambda shape: _norm_forward(shape, vectors=1, statistics=1, flops=5),
    backward=lambda shape: _norm_backward(shape, vectors=1, statistics=1, flops=10),
)


def _layer_eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, EPSILON), total


def _layer_liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_layer_norm

    total = x + residual
    return liger_layer_norm(total, weight, bias, EPSILON), total


LAYER_NORM = Case(
    examples.LAYER_NORM,
    bound="memory",
    eager=_layer_eager,
    liger=_layer_liger,
    # As RMSNorm's, with a mean and a bias: sum, difference, +; backward three sums, a difference.
    forward=lambda shape: _norm_forward(shape, vectors=2, statistics=2, flops=8),
    backward=lambda shape: _norm_backward(shape, vectors=2, statistics=2, flops=14),
)

# --- Activations ---------------------------------------------------------------------------------


def _swiglu_eager(x: Tensor) -> tuple[Tensor, ...]:
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate) * up,)


def _swiglu_liger(x: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_swiglu

    return (liger_swiglu(*x.chunk(2, dim=-1)),)


def _swiglu_forward(shape: LayerShape) -> Work:
    elements = shape.tokens * shape.ffn
    moved = {"gate, up": 2 * elements * narrow, "y": elements * narrow}
    return Work(moved, 5 * elements)  # exp, 1 +, division, times the gate, times up


def _swiglu_backward(shape: LayerShape) -> Work:
    elements = shape.tokens * shape.ffn
    moved = {
        "dy": elements * narrow,
        "gate, up": 2 * elements * narrow,
        "d gate, d up": 2 * elements * narrow,
    }
    return Work(moved, 11 * elements)  # the sigmoid's 3, du 2, dg 6


SWIGLU = Case(
    examples.SWIGLU,
    bound="memory",
    eager=_swiglu_eager,
    liger=_swiglu_liger,
    forward=_swiglu_forward,
    backward=_swiglu_backward,
)


def _gelu_eager(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (F.gelu(x + bias, approximate="tanh"),)


def _gelu_forward(shape: LayerShape) -> Work:
    elements = shape.tokens * shape.ffn
    moved = {"x": elements * narrow, "bias": shape.ffn * narrow, "y": elements * narrow}
    return Work(moved, 10 * elements)  # +, the polynomial's 5, exp, 1 +, division, times h


def _gelu_backward(shape: LayerShape) -> Work:
    elements = shape.tokens * shape.ffn
    groups = gelu_groups(shape.tokens, shape.ffn, True)[0]
    moved = {
        "dy, x": 2 * elements * narrow,
        "bias": shape.ffn * narrow,
        "dx": elements * narrow,
        "partial sums, written and read": 2 * groups * shape.ffn * wide,
        "db": shape.ffn * narrow,
    }
    return Work(moved, 18 * elements)  # forward's 9, the slope's 6, +, times dy, sum


BIAS_GELU = Case(
    examples.BIAS_GELU,
    bound="memory",
    eager=_gelu_eager,
    forward=_gelu_forward,
    backward=_gelu_backward,
)

# --- Rotary positions ----------------------------------------------------------------------------


def _rope_eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As transformers writes it: angles in the dtype of the heads, halves swapped by a copy."""
    cos, sin = (torch.cat((x, x), dim=-1)[:, None, None].to(q.dtype) for x in (cos, sin))
    return tuple(x * cos + _swapped(x) * sin for x in (q, k))


def _swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rope_liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_rope

    tables = (torch.cat((x, x), dim=-1)[None].to(q.dtype) for x in (cos, sin))
    turned = liger_rope(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), *tables)
    return tuple(x.permute(2, 0, 1, 3) for x in turned)


def _rope_work(shape: LayerShape) -> Work:
    """Of either direction."""
    elements = shape.tokens * (shape.heads + shape.kv_heads) * shape.head_dim
    moved = {
        "q, k": elements * narrow,
        "turned": elements * narrow,
        "cos, sin": shape.sequence * shape.head_dim * wide,
    }
    return Work(moved, 3 * elements)


ROPE = Case(
    examples.ROPE,
    bound="memory",
    eager=_rope_eager,
    liger=_rope_liger,
    forward=_rope_work,
    backward=_rope_work,
)

# --- Dropout -------------------------------------------------------------------------------------


def _dropout_eager(x: Tensor, residual: Tensor, samples_B: Tensor) -> tuple[Tensor, ...]:
    """`native_dropout` is what F.dropout calls on a GPU, on any device."""
    return (residual + torch.native_dropout(x, DROPOUT, True)[0],)


def _dropout_exact(x: Tensor, residual: Tensor, samples_B: Tensor) -> tuple[Tensor, ...]:
    kept = keep_mask(DROPOUT, KEY, samples_B, x.shape[0], x.shape[2], 0)
    return (residual + x * kept / (1 - DROPOUT),)


def _dropout_forward(shape: LayerShape) -> Work:
    elements = shape.tokens_part * shape.hidden
    return Work({"x, residual": 2 * elements * narrow, "y": elements * narrow}, 2 * elements)


def _dropout_backward(shape: LayerShape) -> Work:
    elements = shape.tokens_part * shape.hidden
    return Work({"dy, also the residual's": elements * narrow, "dx": elements * narrow}, elements)


DROPOUT_ADD = Case(
    examples.DROPOUT_ADD,
    bound="memory",
    eager=_dropout_eager,
    exact=_dropout_exact,
    draws=True,
    # FLOPs without those of the hash, which are of integers.
    forward=_dropout_forward,
    backward=_dropout_backward,
)

CASES = (RMS_NORM, LAYER_NORM, SWIGLU, BIAS_GELU, ROPE, DROPOUT_ADD)
