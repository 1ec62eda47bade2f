"""Memory of the model states on a rank: weights, gradients, and what the optimizer keeps.

Activations and buffers of communication come on top. States are not yet split over data-parallel
ranks, so each replica holds all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megapipe.config import Config
from megapipe.models.partition import Stage, stage_parameters
from megapipe.precision import PRECISIONS


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

    def __mul__(self, parameters: int) -> "StateBytes":
        return StateBytes(
            self.weights * parameters,
            self.gradients * parameters,
            self.master * parameters,
            self.moments * parameters,
        )


MOMENTS = 2
"""Values that AdamW keeps for each parameter."""


def state_bytes(precision: str) -> StateBytes:
    """Of one parameter, with this train.precision."""
    dtypes = PRECISIONS[precision]
    return StateBytes(
        weights=dtypes.model_bytes,
        gradients=dtypes.main_bytes,
        master=dtypes.main_bytes if dtypes.has_master else 0,
        moments=MOMENTS * dtypes.main_bytes,
    )


def rank_states(config: Config, stages: Sequence[Stage]) -> list[StateBytes]:
    """What each pipeline rank holds, all of its stages together."""
    per_parameter = state_bytes(config.train.precision)
    counts = [0] * config.parallel.pipeline
    for stage in stages:
        counts[stage.rank] += stage_parameters(config, stage)
    return [per_parameter * count for count in counts]
