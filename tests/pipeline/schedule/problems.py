"""Random shapes, costs and limits for the search."""

from math import inf

from hypothesis import strategies as st

from megapipe.pipeline.schedule import Costs
from megapipe.pipeline.schedule.limit import Limit, Memory
from megapipe.pipeline.schedule.placement import looped, v_shaped
from megapipe.pipeline.schedule.words import SchedulingProblem


def problem_of(
    pipeline: int,
    virtual: int,
    microbatches: int,
    *,
    most: float = inf,
    costs: Costs | None = None,
    v: bool = False,
) -> SchedulingProblem:
    """All stages alike unless `costs` are given; `v` places them as a V."""
    ranks = (v_shaped if v else looped)(pipeline, virtual)
    limit = Limit.in_microbatches(most, pipeline, virtual)
    return SchedulingProblem(tuple(ranks), microbatches, costs or Costs(), limit)


@st.composite
def problems(draw: st.DrawFn) -> SchedulingProblem:
    """Unequal stages, often an expensive last one; limits from one microbatch up, or in bytes."""
    pipeline, virtual = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (6, 1), (2, 2)]))
    if draw(st.booleans()) and pipeline > 1:
        pipeline, virtual = draw(st.sampled_from([(2, 2), (3, 2), (4, 2), (2, 3), (5, 1), (8, 1)]))
    stages = pipeline * virtual
    times = st.floats(0.5, 2.0)

    def by_stage() -> list[float]:
        return [draw(times) for _ in range(stages)]

    forward, backward, weight = by_stage(), by_stage(), by_stage()
    if draw(st.booleans()):
        factor = draw(st.floats(1.0, 3.0))
        for kind in (forward, backward, weight):
            kind[-1] *= factor
    costs = Costs(forward, backward, weight, draw(st.sampled_from([0.0, 0.05, 0.5])))
    ranks = (v_shaped if draw(st.booleans()) else looped)(pipeline, virtual)
    if draw(st.integers(0, 3)) == 0:
        sizes = [draw(st.floats(1e6, 1e9)) for _ in range(stages)]
        limit = Limit.in_bytes(Memory(inf, "no limit"), sizes)
        most = limit.least(ranks) * draw(st.sampled_from([1.0, 1.3, 2.0, pipeline]))
        limit = Limit.in_bytes(Memory(most, "drawn"), sizes)
    else:
        most = draw(st.sampled_from([1.0, 1.5, 2.0, pipeline / 2 + 1, pipeline, pipeline + 1, inf]))
        limit = Limit.in_microbatches(max(1.0, most), pipeline, virtual)
    return SchedulingProblem(tuple(ranks), draw(st.integers(1, 3 * pipeline + 1)), costs, limit)
