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
from itertools import pairwise

from megapipe.config.optimizer import OptimizerConfig
from megapipe.config.problems import show

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
    def turns(self) -> list[int]:
        """Steps (counted from 0) at which the course changes its kind, and the last."""
        begin, length = _decay(self.optimizer, self.steps)
        turns = [self.optimizer.warmup_steps - 1, begin, begin + length - 1, self.steps - 1]
        return [min(max(turn, 0), self.steps - 1) for turn in turns]


def course_change(then: Course, now: Course, step: int) -> str | None:
    """One line for people if a run that goes on after `step` steps gets other rates than planned.

    `then` is the course of the checkpoint's run. The line names the first step that was found to
    differ, both rates, and what to set to keep the course.
    """
    for place in _places(then, now, step):
        before, after = then.rate(place), now.rate(place)
        if not math.isclose(before, after, rel_tol=1e-3):
            break
    else:
        return None
    beyond = f" (its rate after its last step, {then.steps})" if place >= then.steps else ""
    keys = ", ".join(f"{key} = {value}" for key, value in keys_to_keep(then, now).items())
    line = (
        f"The learning rate differs from the checkpoint's config: step {place + 1} gets "
        f"{after:.2e} instead of {before:.2e}{beyond}. To keep that, set {keys}."
    )
    begin, _ = _decay(then.optimizer, then.steps)
    if then.optimizer.schedule == "wsd" and begin < step and now.steps > then.steps:
        line += (
            f" Its decay began after step {begin}: to train longer at the peak, go on from a "
            "checkpoint before that (checkpoint.resume)."
        )
    return line


def _places(then: Course, now: Course, step: int) -> list[int]:
    """`step`, later turns of both courses, and the quarters between neighbours, in order.

    Between turns a rate is constant, a line or half a cosine: where two courses differ there, they
    differ at a quarter too, though they may agree at both ends and (line and cosine) in the middle.
    """
    turns = {step, *(turn for course in (then, now) for turn in course.turns if turn > step)}
    places = set(turns)
    for one, other in pairwise(sorted(turns)):
        places |= {one + (other - one) * quarter // 4 for quarter in (1, 2, 3)}
    return sorted(place for place in places if place < now.steps)


def keys_to_keep(then: Course, now: Course) -> dict[str, str]:
    """What `now` has to set so that its rates are those of `then`, as in a config file."""
    old = then.optimizer
    names = ("learning_rate", "min_learning_rate", "schedule", "warmup_steps")
    kept = {name: getattr(old, name) for name in names}
    keys = {
        f"optimizer.{name}": show(value)
        for name, value in kept.items()
        if value != getattr(now.optimizer, name)
    }
    restored, steps = now.optimizer.model_copy(update=kept), now.steps
    if old.schedule == "constant":
        return keys | ({} if restored.decay_steps is None else {"optimizer.decay_steps": '"none"'})
    if old.schedule == "wsd" and steps != then.steps:  # it decays at the end
        steps = then.steps
        keys["train.steps"] = str(steps)
    if _decay(restored, steps) != _decay(old, then.steps):
        keys["optimizer.decay_steps"] = str(max(1, _decay(old, then.steps)[1]))
    return keys
