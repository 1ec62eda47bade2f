"""AdamW over flat buffers (Loshchilov & Hutter 2019): decoupled decay, none on norms and biases."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megapipe.config import OptimizerConfig
from megapipe.data_parallel.buffer import ParameterBuffer
from megapipe.tensor_parallel.parameter import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """torch's fused AdamW on each buffer's master weights, as one long parameter.

    Padding between parameters is zero in weights and gradients, so it stays zero.
    """

    def __init__(self, buffers: Sequence[ParameterBuffer], config: OptimizerConfig) -> None:
        self.buffers = buffers
        self._masters = [nn.Parameter(buffer.master) for buffer in buffers]
        for buffer, master in zip(buffers, self._masters, strict=True):
            master.grad = buffer.gradients
        groups = [
            {"params": [master], "weight_decay": config.weight_decay if buffer.decay else 0.0}
            for buffer, master in zip(buffers, self._masters, strict=True)
        ]
        self._adamw = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True
        )
        for master in self._masters:
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }

    def step(self, learning_rate: float) -> None:
        """Update the master weights from the buffers' gradients, then the model's weights."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        for buffer in self.buffers:
            buffer.publish_master()

    @property
    def steps(self) -> int:
        """Updates so far: Adam's bias correction counts them."""
        return int(self._adamw.state[self._masters[0]]["step"].item())

    @steps.setter
    def steps(self, value: int) -> None:
        for master in self._masters:
            self._adamw.state[master]["step"].fill_(value)

    def state(self) -> Iterator[tuple[str, Piece, Tensor]]:
        """(kind, piece, values): "weights" (the master copy) and both moments; values are views."""
        for buffer, master in zip(self.buffers, self._masters, strict=True):
            for kind, flat in (
                ("weights", buffer.master),
                *((moment, self._adamw.state[master][moment]) for moment in MOMENTS),
            ):
                for piece, view in buffer.pieces(flat):
                    yield kind, piece, view
