"""Parts: what the streams are dealt. A part is some of the rows of a unit, drawn by chance.

Were a unit's rows read together, batches of a sorted corpus would hold few kinds of text. So the
rows of each unit are shuffled and cut into parts, and the parts of all units are shuffled.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from megapipe.data.order.keys import Shuffle, keyed
from megapipe.data.sources import SourceFile
from megapipe.data.units import Cumulated, EqualUnits, Unit, Units

PART_BYTES = 32 << 10
"""Of text, roughly: a few rows, which are held in memory while they wait for their turn."""

MAX_PARTS = 64
"""Of a unit, which is read once for each of its parts."""

PARTS_PER_STREAM = 64
"""Small sources are cut finer, until each stream has this many parts in every epoch."""


class SourcePart(NamedTuple):
    """SourcePart `number` of the `parts` parts of a file's unit."""

    file: int
    unit: int
    number: int
    parts: int


class FileParts:
    """The parts of one file, numbered from 0 in the order of its units."""

    def __init__(self, units: Units, row_bytes: int, factor: int) -> None:
        self.units = units
        self._row_bytes, self._factor = row_bytes, factor
        self._equal = self._cumulated = None
        if isinstance(units, EqualUnits):
            self._equal = self._parts_of(units[0])
            self.total = self._equal * (len(units) - 1) + self._parts_of(units[len(units) - 1])
        else:
            self._cumulated = Cumulated([self._parts_of(unit) for unit in units])
            self.total = self._cumulated.total

    def find(self, number: int) -> tuple[int, int, int]:
        """Unit, part of the unit, and parts that the unit has."""
        if self._cumulated is not None:
            unit, part = self._cumulated.find(number)
        else:
            assert self._equal is not None
            unit, part = divmod(number, self._equal)
            if unit >= len(self.units):  # the last unit may have fewer parts, never more
                raise IndexError(number)
        return unit, part, self._parts_of(self.units[unit])

    def first_of(self, unit: int) -> int:
        """The number of a unit's first part."""
        if self._cumulated is not None:
            return self._cumulated.begin(unit)
        assert self._equal is not None
        return unit * self._equal

    def parts_of(self, unit: int) -> int:
        """How many parts a unit has."""
        return self._parts_of(self.units[unit])

    def _parts_of(self, unit: Unit) -> int:
        if self._row_bytes:
            return max(1, -(-unit.size // self._row_bytes))  # a part is a row
        return max(1, ceil(self._factor * size_in_parts(unit, whole=self.units.whole)))


def size_in_parts(unit: Unit, *, whole: bool) -> float:
    """How many parts a unit has in a large source, fractions included; exact in binary."""
    return 1.0 if whole else min(MAX_PARTS, unit.size / PART_BYTES)


class FileOrder:
    """The order of the parts of files that joined a source together (a cohort), in each epoch.

    `number` counts the cohorts of a source; `key` is drawn by seed and source. Place p of epoch e
    belongs to stream (p + e * places) % streams.
    """

    def __init__(self, files: Sequence[SourceFile], *, key: int, number: int, streams: int) -> None:
        self._key, self._number, self.streams = key, number, streams
        factor = finer(files, streams)
        self.files = [FileParts(file.units, file.row_bytes, factor) for file in files]
        self._cumulated = Cumulated([parts.total for parts in self.files])
        self._epoch = -1
        self._shuffle = Shuffle(0, 0)

    @property
    def places(self) -> int:
        return self._cumulated.total

    def share(self, stream: int, epoch: int) -> int:
        """How many parts a stream has in an epoch."""
        first = self._first(stream, epoch)
        return max(0, -(-(self.places - first) // self.streams))

    def place(self, stream: int, epoch: int, index: int) -> int:
        """The place of a stream's part number `index` of an epoch."""
        return self._first(stream, epoch) + index * self.streams

    def part(self, epoch: int, place: int) -> SourcePart:
        """What stands at a place."""
        file, number = self._cumulated.find(self._shuffled(epoch)[place])
        unit, part, count = self.files[file].find(number)
        return SourcePart(file, unit, part, count)

    def parts_of(self, file: int, unit: int) -> int:
        """How many parts a unit has."""
        return self.files[file].parts_of(unit)

    def place_of(self, epoch: int, part: SourcePart) -> int:
        """Where a part stands in an epoch."""
        number = self._cumulated.begin(part.file) + self.files[part.file].first_of(part.unit)
        return self._shuffled(epoch).place_of(number + part.number)

    def stream_of(self, epoch: int, place: int) -> int:
        """Whose part it is."""
        return (place + epoch * self.places) % self.streams

    def _first(self, stream: int, epoch: int) -> int:
        return (stream - epoch * self.places) % self.streams

    def _shuffled(self, epoch: int) -> Shuffle:
        if epoch != self._epoch:
            self._epoch = epoch
            self._shuffle = Shuffle(self.places, keyed("parts", self._key, self._number, epoch))
        return self._shuffle


def finer(files: Sequence[SourceFile], streams: int) -> int:
    """By how much finer the units of a small source are cut."""
    cut = [file.units for file in files if not file.row_bytes]
    total = sum(map(_total_size, cut))
    only_whole = all(units.whole for units in cut)
    wanted = streams if only_whole else PARTS_PER_STREAM * streams
    return ceil(wanted / total) if 0 < total < wanted else 1


def _total_size(units: Units) -> float:
    """In parts of a large source."""
    if isinstance(units, EqualUnits):
        first, last = units[0], units[len(units) - 1]
        return (len(units) - 1) * size_in_parts(first, whole=False) + size_in_parts(
            last, whole=False
        )
    return sum(size_in_parts(unit, whole=units.whole) for unit in units)


class Place(NamedTuple):
    """A place in an epoch's order of a cohort."""

    epoch: int
    cohort: int
    place: int


class StreamParts:
    """One stream's parts of a source, one after the other, epoch by epoch.

    `taken` parts of each cohort's share of `epoch` were given. Where several cohorts have parts
    left, one is drawn in proportion to what it has left. `since`: the epoch in which each joined.
    """

    def __init__(self, cohorts: Sequence[FileOrder], *, key: int, stream: int) -> None:
        self.epoch = 0
        self.taken: list[int] = []
        self.since: list[int] = []
        self._cohorts: Sequence[FileOrder] = ()
        self._key, self._stream = key, stream
        self.join(cohorts)

    def join(self, cohorts: Sequence[FileOrder]) -> None:
        """All cohorts from here on: those before, and perhaps more."""
        added = len(cohorts) - len(self._cohorts)
        self.taken += [0] * added
        self.since += [self.epoch] * added
        self._cohorts = cohorts

    @property
    def epochs(self) -> float:
        """Passes begun so far, the current one as far as its parts were given."""
        shares = (cohort.share(self._stream, self.epoch) for cohort in self._cohorts)
        return self.epoch + sum(self.taken) / max(1, sum(shares))

    @property
    def left(self) -> int:
        """Parts of the epoch that were not given yet."""
        return sum(self._left())

    def _left(self) -> list[int]:
        return [
            cohort.share(self._stream, self.epoch) - taken
            for cohort, taken in zip(self._cohorts, self.taken, strict=True)
        ]

    def next(self) -> Place | None:
        """The next part of the epoch; None behind its last."""
        left = self._left()
        if not any(left):
            return None
        chosen = self._draw(left)
        index = self.taken[chosen]
        self.taken[chosen] += 1
        return Place(
            self.epoch, chosen, self._cohorts[chosen].place(self._stream, self.epoch, index)
        )

    def begin_epoch(self) -> None:
        """Go on with the next pass."""
        self.epoch += 1
        self.taken = [0] * len(self._cohorts)

    def _draw(self, left: Sequence[int]) -> int:
        if len(left) == 1:
            return 0
        drawn = keyed("cohort", self._key, self._stream, self.epoch, sum(self.taken)) % sum(left)
        return Cumulated(left).find(drawn)[0]
