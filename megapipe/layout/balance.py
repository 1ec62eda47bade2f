"""Cutting layers into stages of equal cost."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import inf

from megapipe.amounts import counted
from megapipe.errors import ScheduleError


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Layers per stage, each at least one, such that the costliest stage costs as little as can be,
    and under that condition the stages are as equal as can be (least squares).

    `costs` are the layers' in order, those of the embedding and the output layer added to the first
    and the last. Exact, by dynamic programming over (stages, layers). Among equals
    the later stages get more layers, since earlier ones hold the activations of more microbatches.
    Raises ScheduleError with fewer layers than stages.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ScheduleError(
            f"{counted(layers, 'layer')} cannot make {counted(stages, 'stage')} of at least one "
            "layer"
        )
    upto = [0.0, *accumulate(costs)]

    def cost(begin: int, end: int) -> float:
        return upto[end] - upto[begin]

    costliest, _ = _cheapest_cuts(cost, layers, stages, max)

    def add_square(so_far: float, stage_cost: float) -> float:
        return so_far + stage_cost**2 if stage_cost <= costliest else inf

    _, bounds = _cheapest_cuts(cost, layers, stages, add_square)
    return [end - begin for begin, end in pairwise(bounds)]


def _cheapest_cuts(
    cost: Callable[[int, int], float],
    layers: int,
    stages: int,
    join: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """(total, where stages begin and the last ends) of the split with the least total, in which
    `join` adds the cost of one more stage to a total, and is never less with a stage that costs
    more: stages are made longer only until they alone are too much."""
    # best[n]: the least total for the first n layers in the stages so far; cuts[s - 1][n]: where
    # stage s, the last of them, begins.
    best = [join(0.0, cost(0, end)) for end in range(layers + 1)]
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        previous, best, cut = best, [inf] * (layers + 1), [0] * (layers + 1)
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            for begin in range(end - 1, stage - 1, -1):
                last = cost(begin, end)
                if join(0.0, last) > best[end]:
                    break
                total = join(previous[begin], last)
                if total <= best[end]:
                    best[end], cut[end] = total, begin
        cuts.append(cut)
    bounds = [layers]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return best[layers], [0, *reversed(bounds)]
