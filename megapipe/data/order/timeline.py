"""When weights change and files join or leave: what the config declares, by steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megapipe.config import DataConfig
from megapipe.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """Weights from the batch behind step `after_step` on: of the sources that are read, in the
    order of their names, and one in sum."""

    after_step: int
    weights: Mapping[str, float]


def phases_of(config: DataConfig, tokens_per_step: int) -> tuple[Phase, ...]:
    """The phases in order; the first begins the run, with the weights of the sources.

    Raises ConfigError where two begin behind the same step.
    """
    phases = [Phase(0, _shares({source.name: source.weight for source in config.sources}))]
    for phase in config.phases:
        step = phase.after_step
        if step is None:
            assert phase.after_tokens is not None
            step = -(-phase.after_tokens // tokens_per_step)
        phases.append(Phase(step, _shares(phase.weights)))
    phases.sort(key=lambda phase: phase.after_step)
    for one, other in pairwise(phases):
        if one.after_step == other.after_step:
            what = "the weights of data.sources" if one is phases[0] else "another phase"
            raise ConfigError(
                [
                    f"data.phases has a phase that begins behind step {other.after_step}, as "
                    f"{what} does; give it a later step, or change the weights there."
                ]
            )
    return tuple(phases)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of the batch behind step `step`."""
    return next(phase for phase in reversed(phases) if phase.after_step <= step)


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weights[name] / total for name in sorted(weights) if weights[name] > 0}
