"""AdamW over flat buffers (Loshchilov & Hutter 2019): decoupled decay, none on norms and biases."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megapipe.config import OptimizerConfig
from megapipe.data_parallel.buffer import ParameterBuffer
from megapipe.tensor_parallel.parameter import Piece


@dataclass(frozen=True)
class Moments:
    """Adam's state of one buffer, laid out like it; `steps` is a float32 scalar."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor


class Optimizer:
    """torch's fused AdamW on each buffer's master weights, as one long parameter.

    Padding between parameters is zero in weights and gradients, so it stays zero. Called as a
    function: the class torch.optim.AdamW imports torch's compiler at its first step, which costs
    each rank 2 s and 100 MB.
    """

    def __init__(self, buffers: Sequence[ParameterBuffer], config: OptimizerConfig) -> None:
        self.buffers = buffers
        self.config = config
        self._moments = [
            Moments(
                exp_avg=torch.zeros_like(buffer.master),
                exp_avg_sq=torch.zeros_like(buffer.master),
                steps=torch.zeros((), dtype=torch.float32, device=buffer.master.device),
            )
            for buffer in buffers
        ]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the master weights from the buffers' gradients, then the model's weights."""
        config = self.config
        for buffer, moments in zip(self.buffers, self._moments, strict=True):
            adamw(
                [buffer.master],
                [buffer.gradients],
                [moments.exp_avg],
                [moments.exp_avg_sq],
                max_exp_avg_sqs=[],
                state_steps=[moments.steps],
                fused=True,
                amsgrad=False,
                beta1=config.betas[0],
                beta2=config.betas[1],
                lr=learning_rate,
                weight_decay=config.weight_decay if buffer.decay else 0.0,
                eps=config.epsilon,
                maximize=False,
            )
            buffer.publish_master()

    @property
    def steps(self) -> int:
        """Updates so far: Adam's bias correction counts them."""
        return int(self._moments[0].steps.item())

    @steps.setter
    def steps(self, value: int) -> None:
        for moments in self._moments:
            moments.steps.fill_(value)

    def state(self) -> Iterator[tuple[str, Piece, Tensor]]:
        """(kind, piece, values): "weights" (the master copy) and both moments; values are views."""
        for buffer, moments in zip(self.buffers, self._moments, strict=True):
            for kind, flat in (
                ("weights", buffer.master),
                ("exp_avg", moments.exp_avg),
                ("exp_avg_sq", moments.exp_avg_sq),
            ):
                for piece, view in buffer.pieces(flat):
                    yield kind, piece, view
