"""The operations that a training step spends its time in besides matrix products and attention.

Each is a function on tensors that knows nothing of ranks, one file per operation. Importable alone:
`from megapipe.kernels import rms_norm`.
"""

from megapipe.kernels.adamw import adamw_
from megapipe.kernels.attention import attention, attention_mask, document_bounds
from megapipe.kernels.backend import Backend, UnsupportedError, backend_of
from megapipe.kernels.cross_entropy import (
    Combined,
    Vocabulary,
    cross_entropy,
    cross_entropy_gradient_,
    cross_entropy_stats_,
    part_cross_entropy,
    rescale,
    token_losses,
)
from megapipe.kernels.dropout import attention_dropout_mask, dropout, dropout_add
from megapipe.kernels.gelu import bias_gelu, gelu
from megapipe.kernels.grad_norm import grad_norm
from megapipe.kernels.layer_norm import add_layer_norm, layer_norm
from megapipe.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_forward
from megapipe.kernels.norm_rope import norm_rope
from megapipe.kernels.random import fold, normal_rectangle
from megapipe.kernels.rms_norm import add_rms_norm, rms_norm
from megapipe.kernels.rope import rope, rope_frequencies, rope_qkv_
from megapipe.kernels.swiglu import swiglu
from megapipe.kernels.weight_grad import WeightGradBackend, add_weight_grad, matmul_adds

__all__ = [
    "Backend",
    "Combined",
    "UnsupportedError",
    "Vocabulary",
    "WeightGradBackend",
    "adamw_",
    "add_layer_norm",
    "add_rms_norm",
    "add_weight_grad",
    "attention",
    "attention_dropout_mask",
    "attention_mask",
    "backend_of",
    "bias_gelu",
    "cross_entropy",
    "cross_entropy_gradient_",
    "cross_entropy_stats_",
    "document_bounds",
    "dropout",
    "dropout_add",
    "fold",
    "gelu",
    "grad_norm",
    "layer_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_forward",
    "matmul_adds",
    "norm_rope",
    "normal_rectangle",
    "part_cross_entropy",
    "rescale",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_qkv_",
    "swiglu",
    "token_losses",
]
