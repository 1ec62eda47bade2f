"""An optimizer over flat buffers: its update rule on each, the state that it keeps, its steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megapipe.data_parallel.buffer import ParameterBuffer
from megapipe.kernels import Backend
from megapipe.layout.parameters import ParameterShard
from megapipe.optim import (
    RULES,
    FlatParameters,
    OptimizerConfig,
    ParameterGroup,
    StepInputs,
    parameter_groups,
)
from megapipe.precision import torch_dtype

WEIGHTS = "weights"
"""Kind of the master weights, beside the names of the optimizer's state."""


class Optimizer:
    """Steps each buffer's master weights, as one long parameter, by the rule of the config."""

    def __init__(
        self, buffers: Sequence[ParameterBuffer], config: OptimizerConfig, backend: Backend
    ) -> None:
        """`buffers` are those of the config's groups."""
        self.buffers = buffers
        self.config = config
        self.backend = backend
        self._rule = RULES[config.name]
        self._groups = parameter_groups(config)
        self._flat = [_flat(buffer, self._groups[buffer.group]) for buffer in buffers]
        self._steps = 0
        self.before_step: Callable[[float], None] | None = None
        """Is called with the gradient scale of each step before a rule may change gradients."""

    @property
    def steps(self) -> int:
        """Steps taken so far, those of a run that this one resumes included."""
        return self._steps

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update the master weights from the buffers' gradients, times `gradient_scale`, and from
        them the model's weights. Gradients may hold anything afterwards."""
        if self.before_step is not None:
            self.before_step(gradient_scale)
        self._steps += 1
        step = StepInputs(self._steps, learning_rate, gradient_scale, self.backend)
        for buffer, flat in zip(self.buffers, self._flat, strict=True):
            self._rule.update(self.config, self._groups[buffer.group], flat, step)
            if not self._rule.rounds_weights:
                buffer.publish_master()

    def state(self) -> Iterator[tuple[str, ParameterShard, Tensor]]:
        """(kind, shard, values): "weights" (the master copy) and what the rule keeps, by name;
        values are views."""
        for buffer, flat in zip(self.buffers, self._flat, strict=True):
            for kind, tensor in {WEIGHTS: flat.master, **flat.state}.items():
                for shard, view in buffer.shards(tensor):
                    yield kind, shard, view

    def scalars(self) -> dict[str, int]:
        """What a checkpoint has to hold besides `state`, by name."""
        return {"optimizer_steps": self._steps}

    def load_scalars(self, saved: Mapping[str, Any]) -> None:
        """Go on from the `scalars` among the entries of a checkpoint."""
        self._steps = int(saved["optimizer_steps"])


def _flat(buffer: ParameterBuffer, group: ParameterGroup) -> FlatParameters:
    master = buffer.master
    state = {
        one.name: torch.zeros_like(
            master, dtype=master.dtype if one.dtype is None else torch_dtype(one.dtype)
        )
        for one in group.state
    }
    assert WEIGHTS not in state, "a name that the master weights have"
    weights = None if master is buffer.weights else buffer.weights
    return FlatParameters(master, buffer.gradients, state, weights)
