"""The rows of a source by their places, for as many streams as there are."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megapipe.data import formats
from megapipe.data.order import source_order
from megapipe.data.order.parts import Place
from megapipe.data.order.rows import RowStore
from megapipe.data.order.source_order import LEAST_OPEN, SourceOrder, window
from megapipe.data.sources import Change, Source, open_source
from tests.data.samples import jsonl, source, write, write_corpus


def ordered(found: Source, streams: int, **fields: Any) -> SourceOrder:
    settings: dict[str, Any] = {"seed": 1, "open_parts": 64, "max_epochs": None}
    return SourceOrder(found, streams=streams, store=RowStore(8), **(settings | fields))


def places_of(order: SourceOrder, epoch: int = 0) -> list[Place]:
    return [
        Place(epoch, number, place)
        for number, cohort in enumerate(order.orders)
        for place in range(cohort.places)
    ]


@pytest.mark.parametrize("streams", [1, 3, 16])
@pytest.mark.parametrize("documents", ["file", "line", "blank-line"])
def test_all_places_of_an_epoch_have_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: str, streams: int
) -> None:
    monkeypatch.setattr(formats, "UNIT_BYTES", 400)
    lines = [b"%d\n" % number + b"\n" * (number % 3 == 0) for number in range(700)]
    for part in range(3):
        write(tmp_path / f"{part}.txt", b"".join(lines[: 300 * part + 50]))
    found = open_source(source(tmp_path / "*.txt", documents=documents), "key", streams)
    expected = Counter(
        (file.key, row.address)
        for file in found.cohorts[0].files
        for row in (file.rows.rows() if file.rows else ())
    )
    order = ordered(found, streams)
    for epoch in range(2):
        rows: Counter[tuple[str, int]] = Counter()
        for place in places_of(order, epoch):
            count = order.rows(place, 0)
            assert count is not None
            given = [order.row(place, number, 0) for number in range(count + 1)]
            assert given.pop() is None, "no more than were counted"
            for row in given:
                assert row is not None
                assert (row.file, row.unit) == order.unit(place)
                rows[row.file.key, row.raw.address] += 1
        assert rows == expected


def test_the_order_is_drawn_by_seed_and_name(tmp_path: Path) -> None:
    write_corpus(tmp_path, files=2, rows=20)
    orders = set()
    for seed in (1, 2):
        for name in ("web", "books"):
            found = open_source(source(tmp_path / "*.jsonl", name), "key", 1)
            order = ordered(found, 1, seed=seed)
            rows = [order.row(place, 0, 0) for place in places_of(order)]
            orders.add(tuple((row.file.key, row.raw.address) for row in rows if row))
    assert len(orders) == 4


def test_files_are_there_from_the_step_on_that_they_join_until_they_leave(tmp_path: Path) -> None:
    write_corpus(tmp_path, files=3, rows=5)
    changes = [
        Change(0, 20, str(tmp_path / "2.jsonl"), None),
        Change(1, 40, None, str(tmp_path / "0.jsonl")),
    ]
    order = ordered(open_source(source(tmp_path / "*.jsonl"), "key", 2, changes=changes), 2)
    assert [len(order.joined(step)) for step in (0, 19, 20, 50)] == [1, 1, 2, 2]
    for step in (20, 39, 40):
        read = {order.unit(place)[0].key for place in places_of(order) if order.rows(place, step)}
        assert read == {"1.jsonl", "2.jsonl", *(["0.jsonl"] if step < 40 else [])}
        for place in places_of(order):
            file, _ = order.unit(place)
            assert order.is_gone(place, step) == (file.key not in read)
            if order.is_gone(place, step):
                assert order.row(place, 0, step) is None


@pytest.mark.parametrize(
    ("streams", "open_parts", "expected"),
    [(8, 1024, 128), (8, 1000, 125), (1024, 1024, LEAST_OPEN), (8, 1, 1), (8, 2, 2), (3, 100, 34)],
)
def test_open_parts_are_shared_by_the_streams(
    tmp_path: Path, streams: int, open_parts: int, expected: int
) -> None:
    write_corpus(tmp_path, files=1, rows=5)
    found = open_source(source(tmp_path / "0.jsonl"), "key", streams)
    assert window(found, streams, open_parts) == expected


def test_few_archives_that_can_not_be_sought_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "SMALL_ARCHIVE", 0)
    monkeypatch.setattr(source_order, "OPEN_ARCHIVES", 16)
    write(tmp_path / "a.jsonl.gz", jsonl(["text"] * 50))
    found = open_source(source(tmp_path / "a.jsonl.gz"), "key", 8)
    assert window(found, 8, 1024) == 2
    order = ordered(found, 4)
    assert order.in_turns
    assert [order.rows(place, 0) for place in places_of(order)] == [None] * 4
    addresses = []
    for place in places_of(order):
        number = 0
        while (row := order.row(place, number, 0)) is not None:
            addresses.append(row.raw.address)
            number += 1
    assert sorted(addresses) == [number * len(jsonl(["text"])) for number in range(50)]
