"""Rectangles against brute force: a rectangle is the set of indices it holds."""

from collections import Counter
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from megapipe.checkpoint.rectangle import Rectangle, covers, first_gap, first_overlap
from tests.checkpoint.samples import shapes, tilings


def indices(rectangle: Rectangle) -> set[tuple[int, ...]]:
    return set(product(*map(range, rectangle.start, rectangle.stop)))


def rectangles(rank: int) -> st.SearchStrategy[Rectangle]:
    numbers = st.tuples(*[st.integers(0, 4)] * rank)
    return st.builds(Rectangle, numbers, numbers)


pairs = st.integers(0, 3).flatmap(lambda rank: st.tuples(rectangles(rank), rectangles(rank)))


targets_and_parts = st.integers(0, 3).flatmap(
    lambda rank: st.tuples(rectangles(rank), st.lists(rectangles(rank), max_size=5))
)


@given(pairs)
def test_intersection(pair: tuple[Rectangle, Rectangle]) -> None:
    a, b = pair
    common = a.intersection(b)
    assert (indices(common) if common else set()) == indices(a) & indices(b)
    assert common is None or common.volume == len(indices(common)) > 0


@given(pairs)
def test_subtract_leaves_disjoint_parts(pair: tuple[Rectangle, Rectangle]) -> None:
    a, b = pair
    counts = Counter(index for part in a.subtract(b) for index in indices(part))
    assert set(counts) == indices(a) - indices(b)
    assert set(counts.values()) <= {1}
    assert len(a.subtract(b)) <= max(1, 2 * len(a.shape))


@given(pairs)
def test_contains(pair: tuple[Rectangle, Rectangle]) -> None:
    a, b = pair
    if b.volume:
        assert a.contains(b) == (indices(b) <= indices(a))
    elif a.contains(b):
        assert all(x <= y for x, y in zip(a.start, b.start, strict=True))


@given(st.data())
def test_slices_cut_the_rectangle_out_of_its_holder(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    tensor = torch.arange(Rectangle.whole(shape).volume).reshape(shape)
    for holder in data.draw(tilings(shape)):
        held = tensor[holder.slices(Rectangle.whole(shape))]
        for part in data.draw(tilings(holder.shape)):
            start = tuple(a + b for a, b in zip(part.start, holder.start, strict=True))
            moved = Rectangle(start, part.shape)
            expected = tensor[moved.slices(Rectangle.whole(shape))]
            assert torch.equal(held[moved.slices(holder)], expected)


@given(st.data())
def test_a_tiling_covers_and_any_change_to_it_does_not(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    whole = Rectangle.whole(shape)
    tiling = data.draw(st.permutations(data.draw(tilings(shape))))
    assert covers(whole, tiling)
    assert first_gap(whole, tiling) is None
    assert first_overlap(tiling) is None
    if whole.volume == 0:
        return
    number = data.draw(st.integers(0, len(tiling) - 1))
    missing = tiling[:number] + tiling[number + 1 :]
    assert not covers(whole, missing)
    gap = first_gap(whole, missing)
    assert gap
    assert indices(gap) <= indices(tiling[number])
    twice = [*tiling, tiling[number]]
    assert not covers(whole, twice)
    assert first_overlap(twice) == (tiling[number], tiling[number])


@given(targets_and_parts)
def test_covers_is_what_counting_says(case: tuple[Rectangle, list[Rectangle]]) -> None:
    target, parts = case
    parts = [part for part in parts if part.volume]
    counts = Counter(index for part in parts for index in indices(part))
    assert covers(target, parts) == (counts == Counter(indices(target)))
    assert (first_overlap(parts) is None) == (set(counts.values()) <= {1})


def test_a_large_grid_is_checked_quickly() -> None:
    """64 x 64 pieces, as of one tensor over 4,096 ranks: seconds here would be hours per model."""
    grid = [Rectangle((16 * i, 8 * j), (16, 8)) for i in range(64) for j in range(64)]
    assert covers(Rectangle.whole((1024, 512)), grid)
    assert not covers(Rectangle.whole((1024, 512)), grid[1:])


def test_text_names_the_range() -> None:
    assert str(Rectangle((0, 2), (4, 6))) == "[0:4, 2:8]"
    assert str(Rectangle((), ())) == "[]"
