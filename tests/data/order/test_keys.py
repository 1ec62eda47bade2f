"""Draws are the same everywhere and for ever: pinned here, since runs go on by them."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data.order.keys import Shuffle, keyed, permutation

keys = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), keys)
def test_permutation_is_one(count: int, key: int) -> None:
    assert sorted(permutation(count, key)) == list(range(count))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), keys)
def test_a_shuffle_is_a_permutation_and_place_of_its_inverse(count: int, key: int) -> None:
    shuffle = Shuffle(count, key)
    order = [shuffle[place] for place in range(count)]
    assert len(shuffle) == count
    assert sorted(order) == list(range(count))
    assert [shuffle.place_of(number) for number in order] == list(range(count))


@settings(deadline=None)
@given(st.integers(1, 2**50), keys, st.data())
def test_a_shuffle_of_any_length_goes_there_and_back(
    count: int, key: int, data: st.DataObject
) -> None:
    shuffle = Shuffle(count, key)
    place = data.draw(st.integers(0, count - 1))
    number = shuffle[place]
    assert 0 <= number < count
    assert shuffle.place_of(number) == place


def test_places_outside_of_a_shuffle_are_refused() -> None:
    shuffle = Shuffle(5, 1)
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            shuffle[wrong]
        with pytest.raises(ValueError):
            shuffle.place_of(wrong)


@pytest.mark.parametrize("kind", ["permutation", "shuffle"])
def test_each_order_is_drawn_equally_often(kind: str) -> None:
    """Of 6,000 draws each of the 6 orders has 1,000 on average; 150 are five deviations."""

    def order(key: int) -> tuple[int, ...]:
        drawn = keyed("test", key)
        if kind == "permutation":
            return tuple(permutation(3, drawn))
        return tuple(Shuffle(3, drawn)[place] for place in range(3))

    draws = Counter(map(order, range(6000)))
    assert len(draws) == 6
    assert all(850 < count < 1150 for count in draws.values())


def test_neighbours_are_torn_apart() -> None:
    """The first 100 places of 10,000 hold numbers from all over it."""
    shuffle = Shuffle(10_000, keyed("test"))
    tenths = Counter(shuffle[place] // 1000 for place in range(100))
    assert len(tenths) == 10
    assert max(tenths.values()) < 25
    steps = Counter(shuffle[place + 1] - shuffle[place] for place in range(999))
    assert max(steps.values()) < 6


def test_draws_never_change() -> None:
    key = keyed("rows", 1, "web", "a.jsonl", 0, 3)
    assert key == 12750952894522395359
    assert permutation(8, key) == [6, 0, 3, 1, 2, 5, 4, 7]
    assert [Shuffle(8, key)[place] for place in range(8)] == [0, 2, 1, 5, 6, 4, 3, 7]
    assert keyed("caf\udce9") == keyed("caf\udce9") != keyed("caf")


def test_what_is_drawn_by_is_kept_apart() -> None:
    assert len({keyed("a", "bc"), keyed("ab", "c"), keyed("abc"), keyed("a", "b", "c")}) == 4
