"""Memory of the model states on a rank: weights, gradients, and what the optimizer keeps.

Activations and buffers of communication come on top. States are not yet split over data-parallel
ranks, so each replica holds all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megapipe.config import Config
from megapipe.models.partition import Stage, stage_parameters


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


# bf16 training accumulates gradients and keeps weights and moments in float32; where the model
# computes in the precision of the optimizer, its weights are their own master copy.
PER_PARAMETER = {
    "bf16": StateBytes(weights=2, gradients=4, master=4, moments=8),
    "fp32": StateBytes(weights=4, gradients=4, master=0, moments=8),
    "fp64": StateBytes(weights=8, gradients=8, master=0, moments=16),
}


def rank_states(config: Config, stages: Sequence[Stage]) -> list[StateBytes]:
    """What each pipeline rank holds, all of its stages together."""
    per_parameter = PER_PARAMETER[config.train.precision]
    counts = [0] * config.parallel.pipeline
    for stage in stages:
        counts[stage.rank] += stage_parameters(config, stage)
    return [per_parameter * count for count in counts]
