"""GELU (Hendrycks & Gimpel 2016).

y = x Phi(x)                                                  exact
y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))             GPT-2's approximation
"""

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, *, approximate: bool) -> Tensor:
    """Elementwise; `approximate` takes the tanh form."""
    return F.gelu(x, approximate="tanh" if approximate else "none")
