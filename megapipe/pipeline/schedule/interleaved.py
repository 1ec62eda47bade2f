"""Interleaved 1F1B (Narayanan et al. 2021, section 2.2): several model chunks on each rank."""

from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.one_f_one_b import alternate


def interleaved(pipeline: int, virtual: int, microbatches: int) -> Program:
    """Bubble (p - 1) / (v m) when p divides m.

    Microbatches go through the chunks in groups of p: the group through chunk 0, through chunk 1,
    and so on. A last group that is smaller is allowed and costs some bubble.
    """
    chunks = range(virtual)
    program = []
    for rank in range(pipeline):

        def actions(kind: Kind, order: list[int], rank: int = rank) -> list[Action]:
            return [
                Action(chunk * pipeline + rank, kind, microbatch)
                for group in groups(microbatches, pipeline)
                for chunk in order
                for microbatch in group
            ]

        forwards = actions(Kind.FORWARD, list(chunks))
        backwards = actions(Kind.BACKWARD, list(reversed(chunks)))
        first_group = min(pipeline, microbatches)
        warmup = 2 * (pipeline - rank - 1) + (virtual - 1) * first_group
        program.append(alternate(forwards, backwards, warmup))
    return program


def groups(microbatches: int, size: int) -> list[range]:
    """Consecutive microbatches in groups of `size`; the last may be smaller."""
    return [range(m, min(m + size, microbatches)) for m in range(0, microbatches, size)]
