"""Interleaved 1F1B (Narayanan et al. 2021, section 2.2): several model chunks on each rank."""

from itertools import pairwise

from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.definition import Schedule
from megapipe.pipeline.schedule.generators.one_f_one_b import alternate


def interleaved(pipeline: int, virtual: int, microbatches: int) -> Program:
    """Bubble (p - 1) / (v m) for m >= p; each of the p - m microbatches that are missing below that
    adds (v - 1) / (v m).

    Rank r holds 2 (p - r - 1) + (v - 1) g + 1 chunks, or all v m if those are fewer, where g is the
    size of the first group: p when p divides m, which makes p + (p - 1) / v microbatches on rank 0.

    Microbatches go through the chunks in groups of p: the group through chunk 0, through chunk 1,
    and so on. Where p does not divide m, groups are larger than p, as few by as little as can be:
    a group smaller than p would come to its next chunk before its first microbatch has, and the
    order would deadlock.
    """
    chunks = range(virtual)
    program = []
    for rank in range(pipeline):

        def actions(kind: Kind, order: list[int], rank: int = rank) -> list[Action]:
            return [
                Action(chunk * pipeline + rank, kind, microbatch)
                for group in microbatch_groups(microbatches, pipeline)
                for chunk in order
                for microbatch in group
            ]

        forwards = actions(Kind.FORWARD, list(chunks))
        backwards = actions(Kind.BACKWARD, list(reversed(chunks)))
        # The first group is the largest: all backwards of a group find its forwards done.
        first_group = len(microbatch_groups(microbatches, pipeline)[0])
        warmup = 2 * (pipeline - rank - 1) + (virtual - 1) * first_group
        program.append(alternate(forwards, backwards, warmup))
    return program


def microbatch_groups(microbatches: int, size: int) -> list[range]:
    """Consecutive microbatches in groups of at least `size`, the larger first; with fewer than
    `size` in all, one group."""
    count = max(1, microbatches // size)
    smallest, larger = divmod(microbatches, count)
    bounds = [group * smallest + min(group, larger) for group in range(count + 1)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


SCHEDULE = Schedule("interleaved-1f1b", interleaved, chunks=(2, None))
