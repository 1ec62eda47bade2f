"""What layers are handed with each microbatch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What every block of a microbatch needs beside the hidden states."""

    samples_B: Tensor
    bounds_2BS: Tensor | None  # of each token's document; None: attention crosses documents
    mask: Tensor | None  # one for all layers, where torch attends and it is not plain causal
    cos: Tensor | None  # [S, D / 2]
    sin: Tensor | None
