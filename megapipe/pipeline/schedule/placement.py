"""Which pipeline rank holds each stage: a list of ranks, by stage."""

from collections.abc import Callable

Placement = Callable[[int, int], list[int]]
"""(pipeline, virtual) -> the rank of each of the pipeline * virtual stages."""


def looped(pipeline: int, virtual: int) -> list[int]:
    """Round after round (Narayanan et al. 2021): 0 1 2 3, 0 1 2 3."""
    return [stage % pipeline for stage in range(pipeline * virtual)]


def v_shaped(pipeline: int, virtual: int) -> list[int]:
    """There and back (Qi et al. 2024): 0 1 2 3, 3 2 1 0. First and last stage share a rank when
    there is an even number of chunks, and so does a tied embedding."""
    there = list(range(pipeline))
    return [rank for chunk in range(virtual) for rank in (there[::-1] if chunk % 2 else there)]
