from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.layout.balance import balance


def badness(costs: list[float], split: list[int]) -> tuple[float, float]:
    """The costliest stage, then how unequal the stages are."""
    totals, begin = [], 0
    for layers in split:
        totals.append(sum(costs[begin : begin + layers]))
        begin += layers
    return max(totals), sum(total**2 for total in totals)


@given(
    st.lists(st.integers(1, 9).map(float), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(0, 20).map(float),
    st.integers(0, 20).map(float),
)
def test_no_split_is_better(costs: list[float], stages: int, first: float, last: float) -> None:
    stages = min(stages, len(costs))
    costs[0] += first
    costs[-1] += last
    split = balance(costs, stages)
    assert len(split) == stages
    assert sum(split) == len(costs)
    assert min(split) >= 1
    every = (
        [end - begin for begin, end in zip((0, *cuts), (*cuts, len(costs)), strict=True)]
        for cuts in combinations(range(1, len(costs)), stages - 1)
    )
    assert badness(costs, split) == min(badness(costs, other) for other in every)


def test_costly_ends_get_fewer_layers() -> None:
    assert balance([1.0] * 8, 4) == [2, 2, 2, 2]
    assert balance([2.0, *[1.0] * 8, 3.0], 4) == [2, 3, 3, 2]
    assert balance([1.25, *[1.0] * 30, 2.5], 8) == [4, 4, 4, 4, 4, 4, 5, 3]


def test_what_does_not_divide_is_spread() -> None:
    assert balance([1.0] * 13, 4) == [3, 3, 3, 4]


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ScheduleError, match="3 layers cannot make 4 stages"):
        balance([1.0] * 3, 4)
