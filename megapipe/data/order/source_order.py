"""The rows of one source in the order of the run, for the streams that one reader hosts."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from megapipe.data.order.keys import keyed
from megapipe.data.order.parts import FileOrder, Place
from megapipe.data.order.rows import OPEN_ARCHIVES, PartOfUnit, RowStore, row_key
from megapipe.data.sources import Source, SourceFile
from megapipe.data.splitters import Raw
from megapipe.data.units import Unit

MOST_FOUND = 1 << 14
"""Places of which a reader remembers what stands there."""

LEAST_OPEN = 4
"""Parts that a stream has open at least, unless data.open_parts is less."""


class RowPlace(NamedTuple):
    """Where a row comes from."""

    file: SourceFile
    unit: Unit
    raw: Raw


Found = tuple[SourceFile, Unit, PartOfUnit | None]
"""What stands at a place: file, unit and part; no part where the file is gone from the disk."""


class SourceOrder:
    """Finds the rows of a source by their places in the order."""

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        streams: int,
        open_parts: int,
        max_epochs: int | None,
        store: RowStore,
    ) -> None:
        self.max_epochs = max_epochs
        self.source = source
        self.seed = seed
        self.streams = streams
        self.key = keyed("source", seed, source.name)
        self.orders = [
            FileOrder(cohort.files, key=self.key, number=number, streams=streams)
            for number, cohort in enumerate(source.cohorts)
        ]
        self.window = window(source, streams, open_parts)
        self.in_turns = in_turns(source)
        self._store = store
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._parts: dict[Place, Found] = {}

    def joined(self, step: int) -> list[FileOrder]:
        """The cohorts that the batch behind step `step` may read."""
        return [
            order
            for order, cohort in zip(self.orders, self.source.cohorts, strict=True)
            if cohort.after_step <= step
        ]

    def row(self, place: Place, number: int, step: int) -> RowPlace | None:
        """Row `number` of the part at a place; None behind its last, or if its file has left."""
        file, unit, part = self._found(place)
        if part is None or self.has_left(file, step):
            return None
        with self._measured(file):
            raw = self._store.row((self.source.name, *place), part, number)
        return None if raw is None else RowPlace(file, unit, raw)

    def rows(self, place: Place, step: int) -> int | None:
        """How many rows a part has; 0 if its file has left. None where that can't be known."""
        file, _, part = self._found(place)
        if part is None or self.has_left(file, step):
            return 0
        with self._measured(file):
            return self._store.count(part)

    def is_gone(self, place: Place, step: int) -> bool:
        """Whether the file of a part has left."""
        file, _ = self.unit(place)
        return self.has_left(file, step)

    def draw_turn(self, stream: int, epoch: int, turn: int, count: int) -> int:
        """A number below `count` for a stream's turn in an epoch."""
        return keyed("turn", self.key, stream, epoch, turn) % count

    def unit(self, place: Place) -> tuple[SourceFile, Unit]:
        """What the part at a place is of."""
        file, unit, _ = self._found(place)
        return file, unit

    def has_left(self, file: SourceFile, step: int) -> bool:
        """Whether the batch behind step `step` must not read a file."""
        return file.rows is None or self.source.leaves.get(file.key, step + 1) <= step

    def take_seconds(self) -> tuple[float, str]:
        """The most that was spent on reading one file since this was asked last, and its key."""
        seconds, key = max(
            ((spent, key) for key, spent in self._seconds.items()), default=(0.0, "")
        )
        self._seconds.clear()
        return seconds, key

    @contextmanager
    def _measured(self, file: SourceFile) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[file.key] += time.perf_counter() - began

    def _found(self, place: Place) -> Found:
        """The part at a place, None where its file is gone from the disk."""
        found = self._parts.get(place)
        if found is None:
            if len(self._parts) >= MOST_FOUND:
                self._parts.clear()
            found = self._parts[place] = self._find(place)
        return found

    def _find(self, place: Place) -> Found:
        part = self.orders[place.cohort].part(place.epoch, place.place)
        file = self.source.cohorts[place.cohort].files[part.file]
        unit = file.units[part.unit]
        if file.rows is None:
            return file, unit, None
        key = row_key(self.seed, self.source.name, file.key, unit, place.epoch)
        whole = file.units.whole
        return file, unit, PartOfUnit(file.rows, unit, whole, part.number, part.parts, key)


def in_turns(source: Source) -> bool:
    """Whether parts take turns from the beginning, since some are read in their own order."""
    return any(file.units.whole for file in source.cohorts[0].files)


def window(source: Source, streams: int, open_parts: int) -> int:
    """How many parts of a source a stream has open, so that its rows are mixed."""
    parts = max(-(-open_parts // streams), min(LEAST_OPEN, open_parts))
    if in_turns(source):
        return min(parts, -(-OPEN_ARCHIVES // streams))
    return parts
