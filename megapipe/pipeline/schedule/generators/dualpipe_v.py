"""DualPipeV (Sea AI Lab and DeepSeek 2025; DeepSeek-V3's DualPipe cut in half): ZB-V's placement,
with a forward and a backward of two microbatches as one action for most of the way, so that one's
communication can hide behind the other's computation."""

from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.counting import Counting
from megapipe.pipeline.schedule.definition import Schedule
from megapipe.pipeline.schedule.placement import v_shaped

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def dualpipe_v(pipeline: int, virtual: int, microbatches: int) -> Program:
    """Bubble (p - 1) / (6 m) where F, I and W take equally long and pairs run one after the other,
    with p + 1/2 microbatches live on every rank."""
    return [_rank(rank, pipeline, microbatches) for rank in range(pipeline)]


def _rank(rank: int, pipeline: int, microbatches: int) -> list[Action]:
    """`out` is the chunk on the way out, `back` the one on the way back."""
    out, back = rank, 2 * pipeline - 1 - rank
    after = pipeline - rank - 1  # ranks that come after this one on the way out
    do = Counting()
    do(2 * after, (out, F))
    do(rank + 1, (out, F), (back, F))
    do(after, (back, I), (back, W), (back, F))
    steady = microbatches - 2 * pipeline + rank + 1
    if after == 0:  # nothing to overlap with yet
        do(1, (out, F), (back, B), ((back, F), (out, B)))
        steady -= 1
    do(steady, ((out, F), (back, B)), ((back, F), (out, B)))
    do(after, (back, B), ((back, F), (out, B)))
    # Backwards only from here. The later half leave their weight gradients for the end.
    half = (rank + 1) // 2
    for turn in range(rank + 1):
        do(1, (back, B if turn < half + (rank + 1) % 2 else I))
        do(1, (out, B if turn < half else I))
    for _ in range(after):
        do.oldest_weight_grad()
        do(1, (out, I))
    for _ in range(rank + 1):
        do.oldest_weight_grad()
    return do.actions


SCHEDULE = Schedule(
    "dualpipe-v",
    dualpipe_v,
    chunks=(2, 2),
    placement=v_shaped,
    least_microbatches=lambda pipeline: 2 * pipeline,
)
