"""ZB-H2 (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024): no rank ever waits between its
first action and its last, at about twice the memory of 1F1B."""

from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.definition import Schedule
from megapipe.pipeline.schedule.generators.one_f_one_b import alternate
from megapipe.pipeline.schedule.generators.zb_h1 import defer_weight_grads


def zb_h2(pipeline: int, virtual: int, microbatches: int) -> Program:
    """2 p - 1 microbatches live on every rank, and no bubble within a rank where F, I and W take
    equally long and m >= 2 p - 1.

    Rank r begins and ends r forwards later than rank 0, so a step that waits for all ranks (as
    clipping by the global norm does) takes as long as with ZB-H1: (p - 1) / (3 m) over the ideal
    for m >= 2 p - 2, and below that (2 (p - 1) - m // 2) / (3 m).
    What the memory buys is slack against unequal stages and slow links.
    """
    program = []
    for rank in range(pipeline):
        forwards = [Action(rank, Kind.FORWARD, m) for m in range(microbatches)]
        backwards = [Action(rank, Kind.BACKWARD, m) for m in range(microbatches)]
        actions = alternate(forwards, backwards, warmup=2 * (pipeline - rank - 1))
        program.append(defer_weight_grads(actions, delay=2 * rank))
    return program


SCHEDULE = Schedule("zb-h2", zb_h2)
