"""Which receive buffer each RECEIVE fills, fixed before the program runs."""

from collections.abc import Sequence

from megapipe.pipeline.schedule.action import LAST_OF_A_BACKWARD, Action, Kind


def assign_buffers(actions: Sequence[Action]) -> dict[Action, int]:
    """For each RECEIVE of one rank's program a buffer number, from 0; as few as its order allows.

    A buffer is held from its RECEIVE until the microbatch's last action at the stage: autograd
    saves the input for the backward, and a weight gradient that is computed apart reads both the
    input and the output's gradient. In forward-only programs the forward is the last. All stages of
    a rank share the buffers.
    """
    last = LAST_OF_A_BACKWARD
    if not any(action.kind in last for action in actions):
        last = frozenset({Kind.FORWARD})
    assigned: dict[Action, int] = {}
    held: dict[tuple[int, int], list[int]] = {}
    free: list[int] = []
    count = 0
    for action in actions:
        place = (action.stage, action.microbatch)
        if action.kind.receives:
            if not free:
                free.append(count)
                count += 1
            assigned[action] = free.pop()
            held.setdefault(place, []).append(assigned[action])
        elif action.kind in last:
            free += held.pop(place, [])
    return assigned
