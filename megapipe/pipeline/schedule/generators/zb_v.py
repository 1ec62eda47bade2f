"""ZB-V (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024): two chunks on a rank, placed as a
V, so that a microbatch's loss is computed where it began and its backward can start at once."""

from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.counting import Counting
from megapipe.pipeline.schedule.definition import Schedule
from megapipe.pipeline.schedule.placement import v_shaped

F, I, W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def zb_v(pipeline: int, virtual: int, microbatches: int) -> Program:
    """Bubble (p - 1) / (6 m) where F, I and W take equally long and m >= (3 p - 1) / 2; with fewer
    microbatches (2 p - m - 1) / (3 m). min(m, p) microbatches live."""
    # The pattern needs 2 p - 1 microbatches to get into its stride: those beyond are left out.
    count = max(microbatches, 2 * pipeline - 1)
    return [
        [action for action in _rank(rank, pipeline, count) if action.microbatch < microbatches]
        for rank in range(pipeline)
    ]


def _rank(rank: int, pipeline: int, microbatches: int) -> list[Action]:
    """`out` is the chunk on the way out, `back` the one on the way back."""
    out, back = rank, 2 * pipeline - 1 - rank
    do = Counting()
    do(2 * (pipeline - rank) - 1, (out, F))
    do(rank, (back, F), (out, F))
    do(pipeline - rank, (back, F), (back, I), (back, W))
    for _ in range(microbatches - do.count(back, F)):
        if do.count(out, F) < microbatches:
            do(1, (out, F))
        do(1, (out, I), (out, W), (back, F), (back, I), (back, W))
    do(rank, (out, I), (back, I))
    do(pipeline - rank, (out, I), (out, W))
    do(microbatches - do.count(back, W), (back, W))
    do(microbatches - do.count(out, W), (out, W))
    return do.actions


SCHEDULE = Schedule("zb-v", zb_v, chunks=(2, 2), placement=v_shaped)
