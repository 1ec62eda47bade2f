"""ZB-H1 (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024): 1F1B whose weight gradients wait.

The input gradient goes to the stage before at once, which is what it waits for; weight gradients
fill the time in which 1F1B waits at the end.
"""

from collections import deque

from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.definition import Schedule
from megapipe.pipeline.schedule.generators.one_f_one_b import one_f_one_b


def zb_h1(pipeline: int, virtual: int, microbatches: int) -> Program:
    """Bubble (p - 1) / (3 m) where F, I and W take equally long and m >= p, with p microbatches
    live on every rank; each microbatch that is missing below p adds 1 / (3 m).

    1F1B has p - rank live; rank r may keep r more whose weight gradient is still to come.
    """
    program = one_f_one_b(pipeline, virtual, microbatches)
    return [defer_weight_grads(actions, delay=rank) for rank, actions in enumerate(program)]


def defer_weight_grads(actions: list[Action], delay: int) -> list[Action]:
    """Each backward as its input gradient, the weight gradient after that of `delay` backwards
    later; what is left at the end goes last, in order."""
    split: list[Action] = []
    pending: deque[Action] = deque()
    for action in actions:
        if action.kind is not Kind.BACKWARD:
            split.append(action)
            continue
        split.append(action._replace(kind=Kind.BACKWARD_INPUT))
        pending.append(action._replace(kind=Kind.BACKWARD_WEIGHT))
        if len(pending) > delay:
            split.append(pending.popleft())
    return split + list(pending)


SCHEDULE = Schedule("zb-h1", zb_h1)
