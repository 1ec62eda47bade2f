"""V-Half (Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024): half the
activation memory of 1F1B at about half its bubble."""

from megapipe.pipeline.schedule.action import Program
from megapipe.pipeline.schedule.building_block import BuildingBlock, repeat
from megapipe.pipeline.schedule.definition import Schedule
from megapipe.pipeline.schedule.placement import v_shaped


def v_half(pipeline: int, virtual: int, microbatches: int) -> Program:
    """At most p / 2 + 1 microbatches live (p even; (p + 1) / 2 odd), where 1F1B has p.

    Bubble (p - 1) / (2 m) where F, I and W take equally long and m > p / 2, half of 1F1B's; when p
    is odd and more than 1, 1 / (6 m) less; for few microbatches (4 p - 2 m - 3) / (6 m).
    """
    gap = 3 if pipeline % 2 == 0 else 0  # keeps the four streams from wanting the same time
    block = BuildingBlock(
        forward_out=lambda rank: 2 * rank,
        forward_back=lambda rank: 3 * pipeline - rank - 2,
        backward_back=lambda rank: 3 * pipeline + gap + 2 * rank - 1,
        backward_out=lambda rank: 6 * pipeline + gap - rank - 2,
    )
    return repeat(block, pipeline, microbatches, limit=pipeline // 2 + 1)


SCHEDULE = Schedule("v-half", v_half, chunks=(2, 2), placement=v_shaped)
