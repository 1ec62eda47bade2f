"""What a run says whose learning rates differ from those planned by the run that it resumes."""

import math
from itertools import pairwise

from megapipe.config.problems import show
from megapipe.optim.learning_rate import Course


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
    begin, _ = then.decay
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
    if Course(restored, steps).decay != then.decay:
        keys["optimizer.decay_steps"] = str(max(1, then.decay[1]))
    return keys
