"""Cutting layers into stages of equal cost."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from megapipe.errors import ScheduleError


def balance(
    costs: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0
) -> list[int]:
    """Layers per stage, each at least one, such that the costliest stage costs as little as can be.

    `costs` are the layers' in order; `first` and `last` are added to the first and last stage (the
    embedding, the output layer). Exact, by dynamic programming over (stages, layers); among equal
    splits, later stages get fewer layers. Raises ScheduleError with fewer layers than stages.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ScheduleError(f"{layers} layers cannot make {stages} stages of at least one layer")
    upto = [0.0, *accumulate(costs)]

    def cost(begin: int, end: int, stage: int) -> float:
        extra = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        return upto[end] - upto[begin] + extra

    # best[n]: the smallest maximum for the first n layers in the stages so far; cuts[s - 1][n]:
    # where stage s, the last of them, begins.
    best = [cost(0, n, 0) for n in range(layers + 1)]
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        previous, best, cut = best, [float("inf")] * (layers + 1), [0] * (layers + 1)
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            best[end], negative = min(
                (max(previous[begin], cost(begin, end, stage)), -begin)
                for begin in range(stage, end)
            )
            cut[end] = -negative
        cuts.append(cut)

    bounds = [layers]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    bounds.append(0)
    bounds.reverse()
    return [end - begin for begin, end in pairwise(bounds)]
