"""The operations that a training step spends its time in besides matrix products and attention.

Each is a function on tensors that knows nothing of ranks, one file per operation. Importable alone:
`from megapipe.kernels import rms_norm`.
"""

from megapipe.kernels.backend import Backend, UnsupportedError, backend_of
from megapipe.kernels.cross_entropy import exp_sum_and_target_, row_max, softmax_gradient_
from megapipe.kernels.dropout import attention_dropout_mask, dropout, dropout_add
from megapipe.kernels.gelu import bias_gelu, gelu
from megapipe.kernels.layer_norm import add_layer_norm, layer_norm
from megapipe.kernels.random import fold, normal_rectangle
from megapipe.kernels.rms_norm import add_rms_norm, rms_norm
from megapipe.kernels.rope import rope, rope_frequencies
from megapipe.kernels.swiglu import swiglu

__all__ = [
    "Backend",
    "UnsupportedError",
    "add_layer_norm",
    "add_rms_norm",
    "attention_dropout_mask",
    "backend_of",
    "bias_gelu",
    "dropout",
    "dropout_add",
    "exp_sum_and_target_",
    "fold",
    "gelu",
    "layer_norm",
    "normal_rectangle",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "row_max",
    "softmax_gradient_",
    "swiglu",
]
