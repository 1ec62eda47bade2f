"""What the store holds never changes the rows, and stays within its budget."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data.formats import TextFile
from megapipe.data.order import rows
from megapipe.data.order.keys import permutation
from megapipe.data.order.rows import PartOfUnit, RowStore, row_key
from megapipe.data.splitters import Raw, Unreadable, split_lines, split_paragraphs
from megapipe.data.units import ListedUnits, Unit, Units


@dataclass(eq=False)
class Memory:
    """A file of one unit in memory that counts how often it is read, and how many rows."""

    texts: list[object]
    name: str = "memory"
    whole: bool = False
    promised: int | None = None
    kind: Literal["text"] = "text"
    row_bytes: int = 0
    reads: int = 0
    rows_read: int = 0
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = Path(self.name)

    @property
    def unit(self) -> Unit:
        size = sum(len(text) for text in self.texts if isinstance(text, bytes))
        return Unit(0, len(self.texts), size)

    def units(self) -> Units:
        return ListedUnits([self.unit], whole=self.whole)

    def row_count(self, unit: Unit) -> int | None:
        return self.promised

    def place(self, unit: Unit, address: int) -> str:
        return f"row {address}"

    def rows(self, unit: Unit | None = None) -> Iterator[Raw]:
        self.reads += 1
        for address, text in enumerate(self.texts):
            self.rows_read += 1
            yield Raw(text, address)

    def part(self, number: int, parts: int, key: int = 7) -> PartOfUnit:
        return PartOfUnit(self, self.unit, self.whole, number, parts, key)


def numbered(count: int, size: int = 20, name: str = "memory") -> Memory:
    return Memory([b"%d:" % row + b"x" * size for row in range(count)], name)


def all_of(store: RowStore, part: PartOfUnit, name: object = "part") -> list[Raw]:
    found = (store.row((name,), part, number) for number in itertools.count())
    return list(iter(lambda: next(found), None))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 2**64 - 1))
def test_the_parts_of_a_unit_have_each_of_its_rows_once(count: int, parts: int, key: int) -> None:
    file = numbered(count)
    store = RowStore(parts)
    found = [all_of(store, file.part(number, parts, key), number) for number in range(parts)]
    addresses = [[row.address for row in part] for part in found]
    order = permutation(count, key)
    assert addresses == [order[number::parts] for number in range(parts)]
    assert all(row.value == file.texts[row.address] for part in found for row in part)


def test_rows_are_shuffled_within_their_unit() -> None:
    file = numbered(100)
    key, other = (row_key(1, "web", "a", file.unit, epoch) for epoch in range(2))
    one = all_of(RowStore(1), file.part(0, 1, key))
    assert one != sorted(one, key=lambda row: row.address)
    assert one != all_of(RowStore(1), file.part(0, 1, other))
    keys = {
        row_key(seed, source, path, Unit(start, 9, 9), epoch)
        for seed in (1, 2)
        for source in ("web", "books")
        for path in ("a", "b")
        for start in (0, 5)
        for epoch in (0, 1)
    }
    assert len(keys) == 32, "drawn by all that names the unit, and by the epoch"


@settings(deadline=None, max_examples=40)
@given(st.randoms(use_true_random=False), st.integers(500, 60_000), st.booleans())
def test_what_is_held_never_changes_the_rows(
    draw: random.Random, budget: int, at_once: bool
) -> None:
    """Four parts of each of five units, asked for in any order: forwards, again, after a jump."""
    files = [numbered(40, 300 * (1 + n), f"file {n}") for n in range(5)]
    files[3].texts[5] = Unreadable("damaged")
    files[4].texts, files[4].promised = [*files[4].texts[:15], Unreadable("damaged")], 40
    expected = {
        (n, part): [
            Raw(file.texts[row], row)
            for row in permutation(40, 7)[part::4]
            if row < len(file.texts)
        ]
        for n, file in enumerate(files)
        for part in range(4)
    }
    with pytest.MonkeyPatch.context() as patch:
        if not at_once:
            patch.setattr(rows, "AT_ONCE", 1000)
        patch.setattr(rows, "WHOLE_UNITS", draw.choice([0, 30_000, 1 << 20]))
        store = RowStore(20, budget)
        positions = dict.fromkeys(expected, 0)
        for _ in range(300):
            name = draw.choice(list(positions))
            if draw.random() < 0.1:
                positions[name] = draw.randrange(len(expected[name]) + 1)
            file, part = name
            number = positions[name]
            found = store.row(name, files[file].part(part, 4), number)
            wanted = expected[name]
            assert found == (wanted[number] if number < len(wanted) else None)
            positions[name] = number + 1 if found else 0
            most = max(budget, 300 * 5 + 400)  # one row is always held
            assert store.held_bytes <= most + rows.WHOLE_UNITS


def test_memory_stays_under_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 parts of 50 KB each are open at 1 MB: a fifth of each is held."""
    files = [numbered(40, 1000, f"file {n}") for n in range(100)]
    budget = 1 << 20
    for units in (0, 1 << 20):
        monkeypatch.setattr(rows, "WHOLE_UNITS", units)
        store = RowStore(100, budget)
        most = 0
        for number in range(40):
            for n, file in enumerate(files):
                assert store.row((n,), file.part(0, 1), number) is not None
                most = max(most, store.held_bytes)
        assert budget / 2 < most <= budget + units
    assert {file.reads for file in files} == {2 * 5}, "8 rows fit at once"


def test_a_row_store_reads_again_at_a_smaller_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WHOLE_UNITS", 0)
    file, again = numbered(40, 1000), numbered(40, 1000)
    one = all_of(RowStore(10), file.part(0, 2))
    assert all_of(RowStore(10, 160_000), again.part(0, 2)) == one
    assert file.reads == 1
    assert again.reads == 2, "16 of 25 KB"


def test_a_small_unit_is_read_once_for_all_of_its_parts_and_epochs() -> None:
    file = numbered(40)
    store = RowStore(4)
    for epoch in range(3):
        for part in range(4):
            assert len(all_of(store, file.part(part, 4, epoch), (part, epoch))) == 10
    assert file.reads == 1


def test_units_of_one_file_that_is_read_in_two_ways_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\nthree\n")
    store = RowStore(2)
    for split, count in ((split_lines, 4), (split_paragraphs, 2)):
        file = TextFile(path, split, "line")
        part = PartOfUnit(file, file.units()[0], False, 0, 1, 7)
        assert len(all_of(store, part, split.__name__)) == count


def test_at_least_one_row_is_held_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WHOLE_UNITS", 0)
    file = numbered(3, 100_000)
    assert len(all_of(RowStore(1000, 1000), file.part(0, 1))) == 3


def test_a_large_unit_is_counted_first_and_then_read_for_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "AT_ONCE", 1000)
    file = numbered(40, 100)
    store = RowStore(4)
    expected = [b"%d:" % row for row in permutation(40, 7)[1::4]]
    found = all_of(store, file.part(1, 4))
    assert [row.value[: len(text)] for row, text in zip(found, expected, strict=True)] == expected  # type: ignore[index]
    assert file.reads == 2


def test_a_part_behind_the_last_row_of_its_unit_is_empty() -> None:
    file = numbered(3)
    store = RowStore(1)
    assert all_of(store, file.part(2, 8)) != []
    assert all_of(store, file.part(3, 8)) == []
    assert all_of(store, file.part(7, 8)) == []
    assert all_of(store, numbered(0, name="empty").part(0, 1)) == []


def test_an_archive_is_read_once_through_in_its_order() -> None:
    file = numbered(100)
    file.whole = True
    store = RowStore(4)
    found: list[list[int]] = [[], [], []]
    for number in range(34):
        for part in range(3):
            row = store.row((part,), file.part(part, 3), number)
            if row is not None:
                found[part].append(row.address)
    assert found == [list(range(part, 100, 3)) for part in range(3)]
    assert file.reads == 3, "once for each part"


def test_an_archive_goes_on_anywhere_and_few_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "OPEN_ARCHIVES", 2)
    files = [numbered(20, name=f"file {n}") for n in range(3)]
    for file in files:
        file.whole = True
    store = RowStore(3)
    for number in (0, 5, 6, 2, 19, 20):
        for n, file in enumerate(files):
            row = store.row((n,), file.part(0, 1), number)
            assert (row and row.address) == (number if number < 20 else None)


def test_a_closed_store_holds_nothing_and_can_go_on() -> None:
    file = numbered(40)
    store = RowStore(1)
    first = store.row(("part",), file.part(0, 1), 0)
    assert store.held_bytes > 0
    store.close()
    assert store.held_bytes == 0
    assert store.row(("part",), file.part(0, 1), 0) == first
