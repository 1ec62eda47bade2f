"""The learning rate of each step: linear warm-up, then constant, linear, cosine or wsd.

A rate belongs to the number of steps taken once its step is done, t = 1 .. steps:

    t <= W            peak * t / W                      W  optimizer.warmup_steps
    t <= B            peak                              B  where the decay begins
    t <= B + D        from peak down to the minimum     D  optimizer.decay_steps
    after that        the minimum

B is W for linear and cosine; wsd (warm-up, stable, decay) has B + D = steps. So the curve has no
jump at W or B, no step is taken at rate 0, and the last step of the run has the minimum, unless
optimizer.decay_steps ends the decay earlier or warm-up fills the whole run.
"""

import math
from dataclasses import dataclass

from megapipe.optim.definition import OptimizerConfig

WSD_DECAY = 10
"""By default, wsd decays over the last 1/10 of the run."""


def learning_rate(step: int, optimizer: OptimizerConfig, steps: int) -> float:
    """The rate for the step about to be taken: `step` were taken before, of `steps` in all."""
    peak, lowest = optimizer.learning_rate, optimizer.min_learning_rate
    done = step + 1
    if done <= optimizer.warmup_steps:
        return peak * (done / optimizer.warmup_steps)
    if optimizer.schedule == "constant":
        return peak
    begin, length = _decay(optimizer, steps)
    if done <= begin:
        return peak
    if done >= begin + length:
        return lowest
    gone = (done - begin) / length
    if optimizer.schedule == "cosine":
        gone = (1 - math.cos(math.pi * gone)) / 2
    # Written so that rounding can't lift a rate above the peak or the one before.
    return max(lowest, peak - (peak - lowest) * gone)


def _decay(optimizer: OptimizerConfig, steps: int) -> tuple[int, int]:
    """(B, D) of the module's docstring."""
    rest = max(0, steps - optimizer.warmup_steps)
    if optimizer.schedule == "wsd":
        length = optimizer.decay_steps or min(rest, math.ceil(steps / WSD_DECAY))
        return steps - length, length
    return optimizer.warmup_steps, optimizer.decay_steps or rest


@dataclass(frozen=True)
class Course:
    """The rates of a whole run of `steps`."""

    optimizer: OptimizerConfig
    steps: int

    def rate(self, step: int) -> float:
        """Of the step about to be taken, `step` were taken before; also beyond the run's end."""
        return learning_rate(step, self.optimizer, self.steps)

    @property
    def decay(self) -> tuple[int, int]:
        """(B, D) of the module's docstring."""
        return _decay(self.optimizer, self.steps)

    @property
    def turns(self) -> list[int]:
        """Steps (counted from 0) at which the course changes its kind, and the last."""
        begin, length = self.decay
        turns = [self.optimizer.warmup_steps - 1, begin, begin + length - 1, self.steps - 1]
        return [min(max(turn, 0), self.steps - 1) for turn in turns]
