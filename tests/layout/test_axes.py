"""Ranks and their coordinates: both ways, and who is in a group with whom."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.config.axes import AXES, AxisKind, Splits
from megapipe.layout.axes import Axes

TWELVE = Axes.of(pipeline=2, data=3, tensor=2)
"""Rank = (pipeline * 3 + data) * 2 + tensor."""
SITES = Axes(
    {"sites": 2, "pipeline": 2, "data": 3, "tensor": 1}, (AxisKind("sites", Splits.SAMPLES), *AXES)
)
"""With a second axis of ranks that read different samples."""

sizes = st.integers(1, 4)
all_axes = st.builds(Axes.of, pipeline=sizes, data=sizes, tensor=sizes)
names = st.sets(st.sampled_from([kind.name for kind in AXES])).map(
    lambda found: tuple(sorted(found))
)


def test_axes_that_are_not_named_have_size_1() -> None:
    assert dict(Axes.of(tensor=4).sizes) == {"pipeline": 1, "data": 1, "tensor": 4}
    assert Axes.of().world_size == 1
    assert Axes.of(tensor=4, pipeline=2).names == ("pipeline", "data", "tensor")


@pytest.mark.parametrize(
    ("wrong", "kinds"),
    [
        ({"pipeline": 1, "tensor": 1}, AXES),
        ({"data": 1, "pipeline": 1, "tensor": 1}, AXES),
        ({"pipeline": 1, "data": 1, "tensor": 1}, AXES[:2]),
    ],
    ids=["one is missing", "another order", "one that has no row"],
)
def test_sizes_are_those_of_the_rows_in_order(
    wrong: dict[str, int], kinds: tuple[AxisKind, ...]
) -> None:
    with pytest.raises(AssertionError):
        Axes(wrong, kinds)


def test_a_name_that_is_no_axis_is_refused() -> None:
    with pytest.raises(AssertionError):
        Axes.of(context=2)
    with pytest.raises(KeyError):
        TWELVE.size("context")


def test_sizes() -> None:
    assert TWELVE.world_size == 12
    assert TWELVE.size("pipeline") == 2
    assert TWELVE.size("data", "tensor") == 6
    assert TWELVE.size() == 1


def test_which_axes_split_what() -> None:
    assert TWELVE.that_split(Splits.SAMPLES) == ("data",)
    assert SITES.that_split(Splits.SAMPLES) == ("sites", "data")
    assert SITES.that_split(Splits.STAGES, Splits.TENSORS) == ("pipeline", "tensor")
    assert SITES.that_split() == ()
    assert SITES.size(*SITES.that_split(Splits.SAMPLES)) == 6


def test_the_last_axis_is_the_fastest() -> None:
    places = [TWELVE.coordinates(rank) for rank in range(12)]
    assert [tuple(place.values()) for place in places] == list(
        product(range(2), range(3), range(2))
    )
    assert [list(place) for place in places] == [["pipeline", "data", "tensor"]] * 12
    assert TWELVE.coordinates(9) == {"pipeline": 1, "data": 1, "tensor": 1}
    assert TWELVE.rank({"tensor": 1, "data": 1, "pipeline": 1}) == 9


@settings(deadline=None)
@given(all_axes)
def test_a_rank_is_where_its_coordinates_say(axes: Axes) -> None:
    for rank in range(axes.world_size):
        assert axes.rank(axes.coordinates(rank)) == rank


def test_groups_by_hand() -> None:
    assert TWELVE.groups("tensor") == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert TWELVE.groups("data") == [(0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11)]
    assert SITES.groups("sites", "data") == [(0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11)]
    assert TWELVE.groups("pipeline", "data", "tensor") == [tuple(range(12))]
    assert TWELVE.groups() == [(rank,) for rank in range(12)]


def test_groups_are_in_order_whatever_the_order_of_names() -> None:
    assert TWELVE.groups("tensor", "pipeline") == TWELVE.groups("pipeline", "tensor")
    assert TWELVE.groups("tensor", "pipeline")[1] == (2, 3, 8, 9)


@settings(deadline=None)
@given(all_axes, names)
def test_groups_divide_the_world(axes: Axes, of: tuple[str, ...]) -> None:
    groups = axes.groups(*of)
    assert sorted(rank for group in groups for rank in group) == list(range(axes.world_size))
    for group in groups:
        assert len(group) == axes.size(*of)
        assert list(group) == sorted(group)
        others = {
            tuple(place for name, place in axes.coordinates(rank).items() if name not in of)
            for rank in group
        }
        assert len(others) == 1, "they agree on all other axes"


def test_subgroups_have_some_places_of_an_axis() -> None:
    wide = Axes.of(pipeline=4, data=1, tensor=2)
    assert wide.subgroups({"pipeline": (0, 3)}) == [(0, 6), (1, 7)]
    assert wide.subgroups({"pipeline": (0, 3), "tensor": (1,)}) == [(1, 7)]
    assert wide.subgroups({"tensor": (0, 1)}) == wide.groups("tensor")


def test_a_rank_is_described_with_its_places() -> None:
    assert TWELVE.describe(9) == "rank 9 (pipeline 1, data 1, tensor 1)"
    assert SITES.describe(7) == "rank 7 (sites 1, pipeline 0, data 1, tensor 0)"
