"""How layers are built on a rank, and what they are handed with each microbatch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapipe.distributed.mesh import Axis
from megapipe.kernel_choice import KernelChoice
from megapipe.tensor_parallel.weight_grad import WeightGradStore


@dataclass(frozen=True)
class LossSettings:
    """How the head computes the loss: see train.linear_cross_entropy and train.z_loss."""

    linear: bool = False
    z_loss: float = 0.0


@dataclass(frozen=True)
class Placement:
    """How a stage is to be built on this rank: handed to every layer.

    `key_value_copies` are the tensor ranks that hold the same key/value head, when there are fewer
    of those than tensor ranks; `seed` is the one that dropout draws from; `kernels` says what the
    layers compute with.
    """

    tensor: Axis
    key_value_copies: Axis
    sequence_parallel: bool
    recompute: bool
    dtype: torch.dtype
    device: torch.device
    seed: int
    store: WeightGradStore
    kernels: KernelChoice
    loss: LossSettings = LossSettings()

    @property
    def linear(self) -> dict[str, Any]:
        """What every linear layer of a block is built with."""
        return {
            "tensor": self.tensor,
            "sequence_parallel": self.sequence_parallel,
            "store": self.store,
            "dtype": self.dtype,
            "device": self.device,
        }


@dataclass(frozen=True)
class Context:
    """What every block of a microbatch needs beside the hidden states."""

    samples_B: Tensor
    bounds_2BS: Tensor | None  # of each token's document; None: attention crosses documents
    mask: Tensor | None  # one for all layers, where torch attends and it is not plain causal
    cos: Tensor | None  # [S, D / 2]
    sin: Tensor | None
