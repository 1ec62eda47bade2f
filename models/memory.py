"""Memory of the model states on a rank: weights, gradients, and what the optimizer keeps.

Activations and buffers of communication come on top. States are not yet split over data-parallel
ranks, so each replica holds all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megapipe.config import Config
from megapipe.models.partition import Stage, stage_parameters
from megapipe.optim import ParameterGroup, parameter_groups
from megapipe.precision import BYTES, PRECISIONS


@dataclass(frozen=True)
class StateBytes:
    """Bytes, for one parameter or for many."""

    weights: int
    gradients: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.master + self.moments

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.master + other.master,
            self.moments + other.moments,
        )

    def __mul__(self, parameters: int) -> "StateBytes":
        return StateBytes(
            self.weights * parameters,
            self.gradients * parameters,
            self.master * parameters,
            self.moments * parameters,
        )


def state_bytes(precision: str, group: ParameterGroup) -> StateBytes:
    """Of one parameter of an optimizer's group, with this train.precision."""
    dtypes = PRECISIONS[precision]
    kept = [dtypes.main if one.dtype is None else one.dtype for one in group.state]
    return StateBytes(
        weights=dtypes.model_bytes,
        gradients=dtypes.main_bytes,
        master=dtypes.main_bytes if dtypes.has_master else 0,
        moments=sum(BYTES[dtype] for dtype in kept),
    )


def rank_states(config: Config, stages: Sequence[Stage]) -> list[StateBytes]:
    """What each pipeline rank holds, all of its stages together."""
    held = [StateBytes(0, 0, 0, 0)] * config.parallel.pipeline
    for group in parameter_groups(config.optimizer):
        per_parameter = state_bytes(config.train.precision, group)
        for stage in stages:
            held[stage.rank] += per_parameter * stage_parameters(config, stage, group.roles)
    return held
