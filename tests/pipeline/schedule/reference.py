"""A simulator that shares nothing with ours but the types: it repeats until nothing changes."""

from collections.abc import Callable
from itertools import pairwise

from megapipe.pipeline.schedule import Action, Kind, Program
from megapipe.pipeline.schedule.action import sequential

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741

Times = dict[Action, tuple[float, float]]


def reference_times(
    program: Program, duration: Callable[[Action], float], latency: float
) -> Times | None:
    """Begin and end of every compute action of a program without communication; None if it never
    finishes. All start at time 0 and are moved later until each stands after what it needs."""
    program = sequential(program)
    rank_of = {action: rank for rank, row in enumerate(program) for action in row}
    last = max(action.stage for action in rank_of)
    before = {b: a for row in program for a, b in pairwise(row)}
    begins = dict.fromkeys(rank_of, 0.0)

    def ready(action: Action, need: Action) -> float:
        crosses = rank_of[need] != rank_of[action]
        return begins[need] + duration(need) + (latency if crosses else 0.0)

    for _ in range(len(begins) + 1):  # a chain is no longer than that
        changed = False
        for action in begins:
            wanted = [ready(action, need) for need in _needs(action, rank_of, last)]
            if action in before:
                wanted.append(begins[before[action]] + duration(before[action]))
            if max(wanted, default=0.0) > begins[action]:
                begins[action], changed = max(wanted), True
        if not changed:
            return {action: (begin, begin + duration(action)) for action, begin in begins.items()}
    return None


def _needs(action: Action, there: dict[Action, int], last: int) -> list[Action]:
    stage, kind, microbatch, _ = action
    if kind is F:
        return [Action(stage - 1, F, microbatch)] if stage else []
    if kind is W:
        return [Action(stage, I, microbatch)]
    needs = [Action(stage, F, microbatch)]
    if stage < last:
        gradients = [Action(stage + 1, of, microbatch) for of in (B, I)]
        needs += [gradient for gradient in gradients if gradient in there]
    return needs
