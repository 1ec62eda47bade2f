"""Schedules as the repetition of one microbatch's times (Qi et al., Pipeline Parallelism with
Controllable Memory, NeurIPS 2024).

A building block says when one microbatch passes each stage, with F, I and W one unit long each. A
new one begins every 6 units, as many as a rank of two chunks works on a microbatch. How long a
microbatch stays on a rank, over 6, is how many the rank holds: the block decides the memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.list_scheduling import list_schedule
from megapipe.pipeline.schedule.placement import v_shaped

PERIOD = 6
Offset = Callable[[int], int]
"""Time of a microbatch on a rank, in units after its begin on rank 0."""


@dataclass(frozen=True)
class BuildingBlock:
    """Times on the V-shaped way: out over ranks 0 to p - 1, back over p - 1 to 0."""

    forward_out: Offset
    forward_back: Offset
    backward_back: Offset
    backward_out: Offset


def repeat(block: BuildingBlock, pipeline: int, microbatches: int, *, limit: int) -> Program:
    """The block once for each microbatch, each action as early as its turn, what it needs, and
    `limit` live chunks on a rank allow; weight gradients go where a rank would wait."""
    ranks = v_shaped(pipeline, 2)

    def time(action: Action) -> float:
        rank, out = ranks[action.stage], action.stage < pipeline
        if action.kind is Kind.FORWARD:
            begin = (block.forward_out if out else block.forward_back)(rank)
        else:
            begin = (block.backward_out if out else block.backward_back)(rank)
        return begin + PERIOD * action.microbatch

    return list_schedule(ranks, microbatches, priority=time, limit=limit)
