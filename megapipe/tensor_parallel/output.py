"""The output layer of a model whose vocabulary is cut over tensor ranks, and its loss."""

from typing import Any

import torch
from torch import Tensor, nn

from megapipe.distributed.mesh import Axis
from megapipe.kernels import Backend
from megapipe.microbatch import MicroBatch
from megapipe.tensor_parallel.linear import column_parallel_linear
from megapipe.tensor_parallel.loss import (
    own_vocabulary,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from megapipe.tensor_parallel.parameter import ShardedParameter
from megapipe.tensor_parallel.source_losses import SourceLosses
from megapipe.tensor_parallel.weight_grad import WeightGradStore


class VocabParallelOutput(nn.Module):
    """[S_local, B, H], microbatch -> the sum of the losses of all targets that are not ignored.

    `weight` holds this rank's rows of a [vocab_size, H] weight, padding included. With `linear` the
    product and the loss are one, and no logits of all tokens are ever there. `z_loss` is part of
    what is trained; a validation loss leaves it out. Where the microbatch says which sources its
    targets come from, each forward also adds their losses to `source_losses`, as they count in the
    sum.
    """

    def __init__(
        self,
        weight: ShardedParameter,
        *,
        tensor: Axis,
        sequence_parallel: bool,
        store: WeightGradStore,
        linear: bool,
        z_loss: float,
        backend: Backend,
        source_losses: SourceLosses | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.tensor = tensor
        self.sequence_parallel = sequence_parallel
        self.store = store
        self.linear = linear
        self.z_loss = z_loss
        self.backend = backend
        self.source_losses = source_losses

    def logits(self, hidden: Tensor) -> Tensor:
        """[S_local, B, H] -> [S, B, V]: this rank's columns, padding included."""
        return column_parallel_linear(
            hidden,
            self.weight,
            None,
            tensor=self.tensor,
            sequence_parallel=self.sequence_parallel,
            store=self.store,
        )

    def forward(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        assert batch.targets_BS is not None
        targets_SB = batch.targets_BS.t()
        if self.source_losses is None or batch.sources_BS is None:
            return self._loss(hidden, targets_SB)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses_SB = torch.empty(targets_SB.shape, dtype=wide, device=hidden.device)
        loss = self._loss(hidden, targets_SB, losses_SB)
        self.source_losses.add(losses_SB, targets_SB, batch.sources_BS.t())
        return loss

    def _loss(self, hidden: Tensor, targets_SB: Tensor, losses_SB: Tensor | None = None) -> Tensor:
        settings: dict[str, Any] = {
            "tensor": self.tensor,
            "z_loss": self.z_loss if self.training else 0.0,
            "losses": losses_SB,
            "backend": self.backend,
        }
        if not self.linear:
            vocabulary = own_vocabulary(self.weight)
            return vocab_parallel_cross_entropy(
                self.logits(hidden), targets_SB, vocabulary=vocabulary, **settings
            )
        return vocab_parallel_linear_cross_entropy(
            hidden,
            self.weight,
            targets_SB,
            sequence_parallel=self.sequence_parallel,
            weight_grad_backend=self.store.backend,
            **settings,
        )
