"""LayerNorm (Ba et al. 2016).

y = w (x - mean) / sqrt(var + epsilon) + b      over the last dimension, per row
"""

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """[..., H], weight [H], bias [H] -> [..., H]; torch's own, one pass each way."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)
