"""Finds rows by their ids or by their places, without tokenising anything."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megapipe.amounts import counted
from megapipe.data.audit.workers import Advance, worker_processes
from megapipe.data.exclusions import as_key, row_id
from megapipe.data.order.source_order import SourceOrder
from megapipe.data.sources import Source, SourceFile
from megapipe.data.splitters import Raw
from megapipe.data.tables import LocalTable
from megapipe.data.trace.replay import Bar
from megapipe.data.trace.rows import unit_at
from megapipe.data.units import Unit
from megapipe.errors import DataError, UsageError
from megapipe.files import shown

UNITS_AT_ONCE = 64
"""That a worker looks through before it takes the next ones."""
NUMBER = re.compile(r"\d[\d,]*")


@dataclass(frozen=True)
class Wanted:
    """The rows with an id; or the row of `file` at `place`: its byte, in archives of several units
    followed by where its unit begins, or its row number from 1 on in tables."""

    id: str | None = None
    file: str = ""
    place: tuple[int, ...] = ()

    @classmethod
    def of(cls, id_: str | None, row: str | None) -> "Wanted":
        """By the words of a command line. Raises UsageError."""
        if row is None:
            return cls(id_)
        file, _, place = row.rpartition(":")
        numbers = tuple(int(found.replace(",", "")) for found in NUMBER.findall(place))
        if not file or not 1 <= len(numbers) <= 2:
            raise UsageError(
                f"--row {shown(row)} names no row: write FILE:PLACE, where PLACE is a byte or, in "
                "a table, a row, as in data/a.jsonl:4096."
            )
        return cls(None, file, numbers)

    def __str__(self) -> str:
        if self.id is not None:
            return f"the id {shown(self.id)}"
        return f"the place {' '.join(map(str, self.place))} of {shown(self.file)}"


class FoundRow(NamedTuple):
    """Row `number` of a unit that has `rows` rows by which parts are cut, of which `readable` can
    be read. `cohort` and `file` are numbers; all but the source count from 0."""

    source: str
    cohort: int
    file: int
    unit: int
    number: int
    rows: int
    readable: int


class _Task(NamedTuple):
    """Units [first, last) of a file."""

    order: int
    cohort: int
    file: int
    first: int
    last: int


def find_rows(
    orders: Sequence[SourceOrder], wanted: Wanted, *, workers: int, bar: Bar
) -> list[FoundRow]:
    """All rows that are wanted, in the order of the sources. Raises DataError where none can be
    found in this way."""
    if wanted.id is None:
        return list(_at_place(orders, wanted))
    named = [n for n, order in enumerate(orders) if order.source.config.id_field is not None]
    if not named:
        raise DataError(
            "no source has an id_field, by which rows have ids. Name the row by its place: --row "
            "FILE:PLACE."
        )
    total = sum(
        unit.size for n in named for file, *_ in _files(orders[n].source) for unit in file.units
    )
    id_ = wanted.id
    found: list[FoundRow] = []

    def look(task: _Task, advance: Advance) -> list[FoundRow]:
        return list(_with_id(orders[task.order].source, task, id_, advance))

    tasks = (task for number in named for task in _tasks(number, orders[number].source))
    with worker_processes(look, workers) as results, bar("Looking for the id", total) as advance:
        for rows in results(tasks, advance):
            found += rows
    places = {order.source.name: number for number, order in enumerate(orders)}
    return sorted(found, key=lambda row: (places[row.source], *row[1:]))


def _files(source: Source) -> Iterator[tuple[SourceFile, int, int]]:
    """Those that can be read, with the numbers of their cohort and in it."""
    for cohort, joined in enumerate(source.cohorts):
        for number, file in enumerate(joined.files):
            if file.rows is not None:
                yield file, cohort, number


def _tasks(order: int, source: Source) -> Iterator[_Task]:
    for file, cohort, number in _files(source):
        units = len(file.units)
        for first in range(0, units, UNITS_AT_ONCE):
            yield _Task(order, cohort, number, first, min(first + UNITS_AT_ONCE, units))


def _with_id(source: Source, task: _Task, id_: str, advance: Advance) -> Iterator[FoundRow]:
    file = source.cohorts[task.cohort].files[task.file]
    for number in range(task.first, task.last):
        unit = file.units[number]
        found = [index for index, one in _ids(source, file, unit, id_) if one == id_]
        if found:
            yield from _rows(source, task.cohort, task.file, number, found)
        advance(unit.size)


def _ids(
    source: Source, file: SourceFile, unit: Unit, id_: str
) -> Iterator[tuple[int, str | None]]:
    """The ids of a unit's rows, by their numbers in it; of text that can't hold `id_`, None."""
    rows, config = file.rows, source.config
    assert rows is not None
    if isinstance(rows, LocalTable):
        assert config.id_field is not None
        ids = replace(rows, column=config.id_field, id_column=None)
        yield from ((index, as_key(raw.value)) for index, raw in enumerate(ids.rows(unit)))
        return
    signs = id_.encode(errors="surrogateescape"), b"\\u", b"\\/"
    for index, raw in enumerate(rows.rows(unit)):
        likely = isinstance(raw.value, bytes) and any(sign in raw.value for sign in signs)
        yield index, row_id(rows, raw, config) if likely else None


def _rows(
    source: Source, cohort: int, file: int, unit: int, indices: Sequence[int]
) -> Iterator[FoundRow]:
    """These rows of a unit, once it is known how many it has."""
    rows = source.cohorts[cohort].files[file].rows
    assert rows is not None
    part = source.cohorts[cohort].files[file].units[unit]
    readable = sum(1 for _ in rows.rows(part))
    count = rows.row_count(part)
    for index in indices:
        yield FoundRow(
            source.name, cohort, file, unit, index, readable if count is None else count, readable
        )


def _at_place(orders: Sequence[SourceOrder], wanted: Wanted) -> Iterator[FoundRow]:
    """The row at a place, once for each source that has its file."""
    known = False
    nearest: list[str] = []
    for order in orders:
        source = order.source
        for file, cohort, number in _files(source):
            path = os.path.normpath(source.root / file.key)
            if wanted.file not in (path, file.key) and os.path.normpath(wanted.file) != path:
                continue
            known = True
            for unit in _units_near(file, wanted.place):
                rows = list(_addresses(file, file.units[unit]))
                address = _address(file, wanted.place)
                found = [index for index, one in rows if one == address]
                yield from _rows(source, cohort, number, unit, found)
                before = [one for _, one in rows if one <= address]
                nearest += [_place(file, file.units[unit], before[-1])] if before else []
                if found:
                    return
    if not known:
        raise DataError(
            f"{shown(wanted.file)} is no file of data.sources that can be read. Name it as "
            "`megapipe data trace --steps` does."
        )
    hint = f" The nearest row before it is {nearest[-1]}." if nearest else ""
    raise DataError(f"{shown(wanted.file)} has no row at {wanted.place[0]:,}.{hint}")


def _address(file: SourceFile, place: Sequence[int]) -> int:
    return place[0] - 1 if isinstance(file.rows, LocalTable) else place[0]


def _units_near(file: SourceFile, place: Sequence[int]) -> list[int]:
    """The units that may hold a row: it need not lie in the one in which it begins."""
    if len(place) == 2:
        return [unit_at(file.units, place[1])]
    near = unit_at(file.units, _address(file, place))
    return [unit for unit in (near - 1, near, near + 1) if 0 <= unit < len(file.units)]


def _addresses(file: SourceFile, unit: Unit) -> Iterator[tuple[int, int]]:
    assert file.rows is not None
    yield from ((index, raw.address) for index, raw in enumerate(file.rows.rows(unit)))


def _place(file: SourceFile, unit: Unit, address: int) -> str:
    assert file.rows is not None
    return file.rows.place(unit, address)


def raw_of(source: Source, row: FoundRow) -> tuple[SourceFile, Unit, Raw]:
    """A row that was found, read again."""
    file = source.cohorts[row.cohort].files[row.file]
    assert file.rows is not None
    unit = file.units[row.unit]
    for index, raw in enumerate(file.rows.rows(unit)):
        if index == row.number:
            return file, unit, raw
    raise DataError(
        f"{file.rows.name}: {counted(row.number, 'row')} are left where it had more. It must not "
        "change while it is read."
    )
