"""Schedules as the repetition of one microbatch's times (Qi et al., Pipeline Parallelism with
Controllable Memory, NeurIPS 2024).

A building block says when one microbatch passes each stage, with F, I and W one unit long each. A
new one begins every 6 units, as many as a rank of two chunks works on a microbatch. How long a
microbatch stays on a rank, over 6, is how many the rank holds: the block decides the memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megapipe.pipeline.schedule.action import Program
from megapipe.pipeline.schedule.limit import Limit
from megapipe.pipeline.schedule.list_scheduling import Pattern, Rules, list_schedule
from megapipe.pipeline.schedule.placement import v_shaped
from megapipe.pipeline.schedule.simulate import Costs
from megapipe.pipeline.schedule.words import SchedulingProblem, to_program

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
    `limit` live microbatches on a rank allow; weight gradients go where a rank would wait."""
    ranks = v_shaped(pipeline, 2)
    out, back = ranks[:pipeline], ranks[pipeline:]
    offsets = [
        *map(block.forward_out, out),
        *map(block.forward_back, back),
        *map(block.backward_out, out),
        *map(block.backward_back, back),
    ]
    allowed = Limit.in_microbatches(limit, pipeline, 2)
    problem = SchedulingProblem(tuple(ranks), microbatches, Costs(), allowed)
    words = list_schedule(problem, Pattern(PERIOD, offsets), Rules(strict=True))
    assert words is not None, "the limit is what the block needs"
    return to_program(words, problem.stages)
