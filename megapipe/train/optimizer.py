"""AdamW over flat buffers (Loshchilov & Hutter 2019): decoupled decay, none on norms and biases."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapipe.config import OptimizerConfig
from megapipe.data_parallel.buffer import ParameterBuffer
from megapipe.kernels import Backend, adamw_
from megapipe.layout.parameters import ParameterShard
from megapipe.parameter_role import Role

GROUPS = ((Role.MATRIX, Role.EMBEDDING, Role.OUTPUT), (Role.NORM, Role.BIAS))
"""Weight decay applies to the first."""


@dataclass(frozen=True)
class Moments:
    """Adam's state of one buffer, laid out like it."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class Optimizer:
    """AdamW on each buffer's master weights, as one long parameter.

    Padding between parameters is zero in weights and gradients, so it stays zero. `steps` are the
    updates so far, which Adam's bias correction counts.
    """

    def __init__(
        self, buffers: Sequence[ParameterBuffer], config: OptimizerConfig, backend: Backend
    ) -> None:
        self.buffers = buffers
        self.config = config
        self.backend = backend
        self.steps = 0
        self._moments = [
            Moments(torch.zeros_like(buffer.master), torch.zeros_like(buffer.master))
            for buffer in buffers
        ]

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update the master weights from the buffers' gradients, times `gradient_scale`, and from
        them the model's weights. torch leaves the gradients scaled, Triton as they were."""
        config = self.config
        self.steps += 1
        for buffer, moments in zip(self.buffers, self._moments, strict=True):
            adamw_(
                buffer.master,
                buffer.gradients,
                moments.exp_avg,
                moments.exp_avg_sq,
                step=self.steps,
                learning_rate=learning_rate,
                betas=config.betas,
                epsilon=config.epsilon,
                weight_decay=config.weight_decay if buffer.group == 0 else 0.0,
                gradient_scale=gradient_scale,
                weights=None if buffer.master is buffer.weights else buffer.weights,
                backend=self.backend,
            )

    def state(self) -> Iterator[tuple[str, ParameterShard, Tensor]]:
        """(kind, shard, values): "weights" (the master copy) and both moments; values are views."""
        for buffer, moments in zip(self.buffers, self._moments, strict=True):
            for kind, flat in (
                ("weights", buffer.master),
                ("exp_avg", moments.exp_avg),
                ("exp_avg_sq", moments.exp_avg_sq),
            ):
                for shard, view in buffer.shards(flat):
                    yield kind, shard, view
