"""V-Min (Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024): a third of the
activation memory of 1F1B, the least that a V can have, at about two thirds of its bubble."""

from megapipe.pipeline.schedule.action import Program
from megapipe.pipeline.schedule.building_block import BuildingBlock, repeat
from megapipe.pipeline.schedule.definition import Schedule
from megapipe.pipeline.schedule.placement import v_shaped


def v_min(pipeline: int, virtual: int, microbatches: int) -> Program:
    """At most (p + 2) / 3 microbatches live, rounded up, where 1F1B has p.

    Bubble (4 p - 5) / (6 m) where F, I and W take equally long and p > 1, two thirds of 1F1B's;
    when 3 divides p and m > p / 3, 1 / (3 m) more.
    """
    gap = 2 if pipeline % 3 == 0 else 0  # keeps the four streams from wanting the same time
    block = BuildingBlock(
        forward_out=lambda rank: rank,
        forward_back=lambda rank: 2 * pipeline - rank - 1,
        backward_back=lambda rank: 2 * pipeline + gap + rank,
        backward_out=lambda rank: 4 * pipeline + gap - rank - 1,
    )
    return repeat(block, pipeline, microbatches, limit=(pipeline + 4) // 3)


SCHEDULE = Schedule("v-min", v_min, chunks=(2, 2), placement=v_shaped)
