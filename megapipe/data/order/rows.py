"""Gives the rows of parts, and holds some of them in memory.

What is held never changes which row comes when: a row that is not held is read again.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from megapipe.data.formats import RowFile
from megapipe.data.order.keys import keyed, permutation
from megapipe.data.splitters import Raw
from megapipe.data.units import Unit

HELD_BYTES = 256 << 20
"""Of rows that one reader has read and not yet given, over all of its sources."""

WHOLE_UNITS = 64 << 20
"""Of whole units beside that. A small corpus fits, and is read once."""

MOST_OF_UNIT = 8 << 20
"""A unit with more text than this is not kept whole."""

AT_ONCE = 16 << 20
"""A unit with more text than this is read twice: once to count its rows, once for those wanted."""

OPEN_ARCHIVES = 64
"""Archives without a place to start from in their middle that a reader keeps open."""

MOST_COUNTS = 1 << 16
"""Units of which a reader remembers how many rows they have."""

SHORT = 1 << 12
"""The orders of units of up to this many rows are remembered."""

ROW_COST = 250
"""Bytes that Python takes for a row beside its text."""


class PartOfUnit(NamedTuple):
    """A part in full: which rows of which unit of which file, in which order.

    It is part `number` of the unit's `parts`."""

    file: RowFile
    unit: Unit
    whole: bool
    number: int
    parts: int
    key: int
    """Draws the order of the unit's rows."""


Name = tuple[object, ...]
"""What a reader calls a part by."""


class _Held(NamedTuple):
    """Rows of a part from number `first` on; `ends`: the last of them is the part's last."""

    first: int
    rows: Sequence[Raw]
    ends: bool
    size: int


@dataclass
class _Open:
    rows: Iterator[Raw]
    next: int


@dataclass
class RowStore:
    """The rows of all parts that one reader has open. `parts`: about how many those are."""

    parts: int
    budget: int = HELD_BYTES
    _held: OrderedDict[Name, _Held] = field(default_factory=OrderedDict)
    _open: OrderedDict[Name, _Open] = field(default_factory=OrderedDict)
    _units: OrderedDict[Name, tuple[Mapping[int, Raw], int]] = field(default_factory=OrderedDict)
    _counts: OrderedDict[Name, int] = field(default_factory=OrderedDict)
    _size: int = 0
    _units_size: int = 0

    @property
    def held_bytes(self) -> int:
        """Of rows in memory, roughly."""
        return self._size + self._units_size

    def row(self, name: Name, part: PartOfUnit, number: int) -> Raw | None:
        """Row `number` of a part; None behind its last."""
        if part.whole:
            return self._sequential(name, part, number)
        held = self._held.get(name)
        if held is None or not held.first <= number <= held.first + len(held.rows):
            held = self._load(name, part, number)
        place = number - held.first
        if place == len(held.rows):
            if held.ends:
                self._drop(name)
                return None
            held, place = self._load(name, part, number), 0
            if not held.rows:
                return None
        self._held.move_to_end(name)
        return held.rows[place]

    def count(self, part: PartOfUnit) -> int | None:
        """How many rows a part has; None for one that is read in its own order."""
        if part.whole:
            return None
        rows = self._known_count(part)
        if rows is None:
            rows, _ = self._unit(part)
        return max(0, -(-(rows - part.number) // part.parts))

    def close(self) -> None:
        self._open.clear()
        self._held.clear()
        self._units.clear()
        self._size = self._units_size = 0

    def _load(self, name: Name, part: PartOfUnit, first: int) -> _Held:
        """Reads rows of a part from `first` on, as many as may be held."""
        count, rows = self._unit(part)
        wanted = _order(part, count)
        if rows is None and wanted:
            rows = _read_some(part, set(wanted))
        # A damaged unit has fewer rows than were counted; the others are numbered without those.
        found = [rows[index] for index in wanted if index in rows][first:] if rows else []
        kept, size = self._as_much_as_fits(found)
        held = _Held(first, found[:kept], kept == len(found), size)
        self._drop(name)
        self._held[name] = held
        self._size += size
        while self._size > self.budget and len(self._held) > 1:
            self._drop(next(iter(self._held)))
        return held

    def _unit(self, part: PartOfUnit) -> tuple[int, Mapping[int, Raw] | None]:
        """How many rows a unit has, and the rows where they are at hand or were little enough."""
        name = _unit_name(part)
        if name in self._units:
            self._units.move_to_end(name)
            rows, _ = self._units[name]
            return self._known_count(part) or len(rows), rows
        count = self._known_count(part)
        if count is not None and (part.number >= count or part.unit.size > MOST_OF_UNIT):
            return count, None
        read_rows, size, read = _read_all(part)
        count = self._counts[name] = count or read_rows
        if len(self._counts) > MOST_COUNTS:
            self._counts.popitem(last=False)
        if read is not None and size <= MOST_OF_UNIT:
            self._units[name] = read, size
            self._units_size += size
            while self._units_size > WHOLE_UNITS:
                _, (_, size) = self._units.popitem(last=False)
                self._units_size -= size
        return count, read

    def _known_count(self, part: PartOfUnit) -> int | None:
        """How many rows a unit has, without reading it."""
        count = part.file.row_count(part.unit)
        return count if count is not None else self._counts.get(_unit_name(part))

    def _as_much_as_fits(self, rows: Sequence[Raw]) -> tuple[int, int]:
        """At least one row. No part takes more than its share, or none would be held when its turn
        comes again."""
        room = self.budget // max(self.parts, 1)
        size = 0
        for kept, row in enumerate(rows):
            cost = _cost(row)
            if kept and size + cost > room:
                return kept, size
            size += cost
        return len(rows), size

    def _drop(self, name: Name) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            self._size -= held.size

    def _sequential(self, name: Name, part: PartOfUnit, number: int) -> Raw | None:
        """Of an archive that is read from its beginning: rows in its own order."""
        opened = self._open.get(name)
        if opened is None or opened.next > number:
            rows = islice(part.file.rows(part.unit), part.number, None, part.parts)
            opened = self._open[name] = _Open(rows, 0)
            while len(self._open) > OPEN_ARCHIVES:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        row = next(islice(opened.rows, number - opened.next, None), None)
        opened.next = number + 1
        if row is None:
            del self._open[name]
        return row


def _unit_name(part: PartOfUnit) -> Name:
    """What a reader calls a unit by: also by the way in which its file is read."""
    return part.file, part.unit.start


def _order(part: PartOfUnit, count: int) -> list[int]:
    """The rows of a part, by their numbers in the unit."""
    if part.number >= count:
        return []
    drawn = _permutation(count, part.key) if count <= SHORT else permutation(count, part.key)
    return drawn[part.number :: part.parts]


@lru_cache(maxsize=256)
def _permutation(count: int, key: int) -> list[int]:
    """Of a unit whose parts are likely to be wanted one after the other."""
    return permutation(count, key)


def _read_all(part: PartOfUnit) -> tuple[int, int, dict[int, Raw] | None]:
    """How many rows a unit has, how much they take, and the rows if that is not too much."""
    rows: dict[int, Raw] | None = {}
    count = size = 0
    for row in part.file.rows(part.unit):
        size += _cost(row)
        if rows is not None and size <= AT_ONCE:
            rows[count] = row
        else:
            rows = None
        count += 1
    return count, size, rows


def _cost(row: Raw) -> int:
    return ROW_COST + (len(row.value) if isinstance(row.value, bytes) else 0)


def _read_some(part: PartOfUnit, wanted: set[int]) -> dict[int, Raw]:
    last = max(wanted)
    rows = islice(part.file.rows(part.unit), last + 1)
    return {index: row for index, row in enumerate(rows) if index in wanted}


def row_key(seed: int, source: str, file: str, unit: Unit, epoch: int) -> int:
    """What draws the order of a unit's rows in an epoch."""
    return keyed("rows", seed, source, file, unit.start, epoch)
