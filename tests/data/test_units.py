import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data.units import Cumulated, EqualUnits, ListedUnits, Unit, Units, units_of


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 700))
def test_equal_units_are_the_whole_file(size: int, step: int) -> None:
    units = EqualUnits(size, step)
    found = [units[index] for index in range(len(units))]
    assert found == list(units) == units[:]
    assert units[1:] == found[1:]
    assert found[0].start == 0
    assert found[-1].end == size
    assert all(one.end == other.start for one, other in itertools.pairwise(found))
    assert all(unit.size == unit.end - unit.start for unit in found)
    assert all(unit.size == step for unit in found[:-1])
    assert 0 < found[-1].size <= step or found == [Unit(0, 0, 0)]
    assert not units.whole


def test_there_is_no_unit_behind_the_last() -> None:
    units: Units
    for units in (EqualUnits(10, 4), ListedUnits([Unit(0, 1, 5)] * 3)):
        with pytest.raises(IndexError):
            units[3]


def test_a_file_without_units_has_an_empty_one() -> None:
    assert list(ListedUnits([])) == [Unit(0, 0, 0)]


@pytest.mark.parametrize(
    "units",
    [
        EqualUnits(1000, 300),
        ListedUnits([Unit(0, 5, 70), Unit(5, 9, 80, 3)]),
        ListedUnits([Unit(0, 5, 70)], whole=True),
    ],
    ids=["equal", "listed", "whole"],
)
def test_units_survive_json(units: Units) -> None:
    again = units_of(json.loads(json.dumps(units.state())))
    assert list(again) == list(units)
    assert (type(again), again.whole, again.state()) == (type(units), units.whole, units.state())


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8))
def test_items_are_found_in_their_runs(counts: list[int]) -> None:
    runs = Cumulated(counts)
    expected = [(run, item) for run, count in enumerate(counts) for item in range(count)]
    assert runs.total == len(expected)
    assert [runs.find(item) for item in range(runs.total)] == expected
    assert [runs.begin(run) for run in range(len(counts))] == [
        sum(counts[:run]) for run in range(len(counts))
    ]
