"""Every part is dealt once in every epoch, whatever the number of streams."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data.order import parts
from megapipe.data.order.keys import keyed
from megapipe.data.order.parts import (
    MAX_PARTS,
    FileOrder,
    Place,
    SourcePart,
    StreamParts,
)
from megapipe.data.sources import SourceFile
from megapipe.data.units import EqualUnits, ListedUnits, Unit, Units

PART, PER_STREAM = 128, 4
"""Bytes of a part in these tests, and parts that a stream has at least."""

EPOCHS = 4


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", PART)
    monkeypatch.setattr(parts, "PARTS_PER_STREAM", PER_STREAM)


def listed(sizes: Sequence[int], *, whole: bool = False) -> ListedUnits:
    return ListedUnits([Unit(n, n + 1, size) for n, size in enumerate(sizes)], whole=whole)


def found(units: Units, row_bytes: int = 0) -> SourceFile:
    return SourceFile("file", 0, "", units, row_bytes, None)


one_file = st.one_of(
    st.builds(listed, st.lists(st.integers(0, 900), max_size=4)),
    st.builds(EqualUnits, st.integers(0, 5000), st.integers(300, 900)),
    st.just(listed([3000], whole=True)),
)
some_files = st.lists(one_file, min_size=1, max_size=4)


def every_part(files: Sequence[Units], streams: int) -> list[SourcePart]:
    """By its definition: all parts of all units of all files, in their order."""
    sizes = [
        [Fraction(1) if file.whole else min(Fraction(unit.size, PART), MAX_PARTS) for unit in file]
        for file in files
    ]
    total = sum(map(sum, sizes))
    wanted = streams * (1 if all(file.whole for file in files) else PER_STREAM)
    factor = math.ceil(wanted / total) if 0 < total < wanted else 1
    return [
        SourcePart(file, unit, number, count)
        for file, units in enumerate(sizes)
        for unit, size in enumerate(units)
        for count in [max(1, math.ceil(factor * size))]
        for number in range(count)
    ]


def order_of(files: Sequence[Units], streams: int, number: int = 0) -> FileOrder:
    return FileOrder(
        [found(units) for units in files], key=keyed("test"), number=number, streams=streams
    )


@settings(deadline=None, max_examples=60)
@given(some_files, st.integers(1, 40))
def test_each_epoch_deals_every_part_to_one_stream(files: list[Units], streams: int) -> None:
    order = order_of(files, streams)
    expected = every_part(files, streams)
    for epoch in range(EPOCHS):
        dealt = []
        for stream in range(streams):
            for index in range(order.share(stream, epoch)):
                place = order.place(stream, epoch, index)
                assert order.stream_of(epoch, place) == stream
                part = order.part(epoch, place)
                assert order.place_of(epoch, part) == place
                dealt.append(part)
        assert len(dealt) == order.places
        assert sorted(dealt) == expected


@settings(deadline=None, max_examples=30)
@given(some_files, st.integers(1, 12))
def test_shares_of_streams_differ_by_one_and_even_out(files: list[Units], streams: int) -> None:
    """Places go on from one epoch to the next, so that no stream is ahead for ever."""
    order = order_of(files, streams)
    given_to: Counter[int] = Counter()
    for epoch in range(3 * streams):
        shares = [order.share(stream, epoch) for stream in range(streams)]
        assert max(shares) - min(shares) <= 1
        given_to.update(dict(enumerate(shares)))
        assert max(given_to.values()) - min(given_to[stream] for stream in range(streams)) <= 1


@settings(deadline=None, max_examples=40)
@given(some_files, st.integers(1, 300))
def test_small_sources_are_cut_finer_until_every_stream_has_some(
    files: list[Units], streams: int
) -> None:
    order = order_of(files, streams)
    if all(unit.size == 0 for file in files for unit in file):
        return  # there is nothing to cut
    least = 1 if all(file.whole for file in files) else PER_STREAM
    assert min(order.share(stream, 0) for stream in range(streams)) >= least


def test_rows_of_their_own_are_not_cut() -> None:
    """Where a row is a segment of 100 bytes, so is a part, however many streams there are."""
    files = [found(EqualUnits(950, 100), 100), found(listed([1]))]
    alone = FileOrder(files[:1], key=1, number=0, streams=64)
    assert alone.places == 10
    assert {alone.part(0, place) for place in range(10)} == {
        SourcePart(0, n, 0, 1) for n in range(10)
    }
    both = FileOrder(files, key=1, number=0, streams=64)
    assert both.places == 10 + PER_STREAM * 64, "another file of the source may be"


def test_a_unit_has_no_more_than_so_many_parts() -> None:
    assert order_of([listed([10**9])], 1).places == parts.MAX_PARTS
    assert order_of([listed([10**9], whole=True)], 1).places == 1


def test_each_epoch_and_each_cohort_has_an_order_of_its_own() -> None:
    files = [EqualUnits(50 * PART, 1024)]
    orders = {
        tuple(order_of(files, 1, number).part(epoch, place) for place in range(50))
        for number in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


# --- The parts of one stream ---------------------------------------------------------------------


def epoch_of(one: StreamParts) -> list[Place]:
    return list(iter(one.next, None))


@settings(deadline=None, max_examples=40)
@given(some_files, some_files, st.integers(1, 8), st.data())
def test_a_cohort_that_joins_within_an_epoch_is_read_in_it_once(
    first: list[Units], later: list[Units], streams: int, data: st.DataObject
) -> None:
    cohorts = [order_of(first, streams), order_of(later, streams, number=1)]
    dealt: dict[int, list[Place]] = {0: [], 1: []}
    for stream in range(streams):
        one = StreamParts(cohorts[:1], key=keyed("test"), stream=stream)
        for _ in range(data.draw(st.integers(0, cohorts[0].share(stream, 0)))):
            dealt[0].append(one.next() or pytest.fail("a part is left"))
        one.join(cohorts)
        assert one.since == [0, 0]
        dealt[0] += epoch_of(one)
        one.begin_epoch()
        dealt[1] += epoch_of(one)
    for epoch, places in dealt.items():
        expected = [
            Place(epoch, number, place)
            for number, cohort in enumerate(cohorts)
            for place in range(cohort.places)
        ]
        assert sorted(places) == expected


def test_cohorts_are_mixed_in_proportion() -> None:
    """Of 300 parts and 100 parts, each quarter of an epoch has about three to one."""
    cohorts = [
        order_of([EqualUnits(300 * PART, 1024)], 1),
        order_of([EqualUnits(100 * PART, 1024)], 1, 1),
    ]
    one = StreamParts(cohorts, key=keyed("test"), stream=0)
    found = [place.cohort for place in epoch_of(one)]
    assert Counter(found) == {0: 300, 1: 100}
    for start in range(0, 400, 100):
        assert 12 <= sum(found[start : start + 100]) <= 38


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 120), st.integers(0, 3))
def test_what_was_taken_is_the_whole_state(before: int, stream: int) -> None:
    cohorts = [order_of([EqualUnits(12_000, 500)], 4), order_of([EqualUnits(4_000, 500)], 4, 1)]
    one = StreamParts(cohorts, key=keyed("test"), stream=stream)
    for _ in range(before):
        if one.next() is None:
            one.begin_epoch()
    other = StreamParts(cohorts, key=keyed("test"), stream=stream)
    other.epoch, other.taken, other.since = one.epoch, list(one.taken), list(one.since)
    assert other.epochs == one.epochs
    assert epoch_of(other) == epoch_of(one)


def test_passes_are_counted_in_parts() -> None:
    one = StreamParts([order_of([EqualUnits(400 * PART, 1024)], 2)], key=1, stream=0)
    assert (one.epochs, one.left) == (0, 200)
    for _ in range(50):
        one.next()
    assert (one.epochs, one.left) == (0.25, 150)
    epoch_of(one)
    one.begin_epoch()
    assert one.epochs == 1
