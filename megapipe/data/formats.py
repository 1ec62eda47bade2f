"""Files of text: their units, and the raw rows in each. Nothing is decoded or judged here."""

import io
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megapipe.amounts import counted
from megapipe.data.compressed import Damage, Decompressed, codec
from megapipe.data.files import COMPRESSED, check_unchanged, open_unchanged
from megapipe.data.frames import UNFOLDS, frame_units
from megapipe.data.splitters import Extent, Raw, Splitter, Unreadable, incomplete_tail
from megapipe.data.units import UNIT_BYTES, EqualUnits, ListedUnits, Unit, Units
from megapipe.errors import DataError
from megapipe.files import shown

SMALL_ARCHIVE = 1 << 20
"""An archive up to this size on the disk is one unit whose rows are shuffled, like any other."""

DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class NoRows:
    """The one row of a file that has none, so that each file is counted."""


Kind = Literal["json", "line", "text"]
"""How bytes become text: a JSON object's field, a line without its end, or all of them."""


class RowFile(Protocol):
    """One file of a source."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def kind(self) -> Kind: ...
    @property
    def row_bytes(self) -> int:
        """The size of a row where a file's rows are large pieces of it; 0 where they are not."""
        ...

    def units(self) -> Units:
        """What can be read by itself, found without reading the text."""
        ...

    def rows(self, unit: Unit | None = None) -> Iterator[Raw]:
        """The rows of a unit, or of the whole file."""
        ...

    def row_count(self, unit: Unit) -> int | None:
        """How many rows a unit has, None where only reading it tells. Behind damage there are
        fewer."""
        ...

    def place(self, unit: Unit, address: int) -> str:
        """Where a row is, for messages: "row 12" or "byte 4,096"."""
        ...


@dataclass(frozen=True)
class TextFile:
    """A file of bytes, perhaps compressed, cut into rows by `split`. `size` is that of the file
    where it was found; None in tests of their own. `row_bytes`: rows are segments of that size."""

    path: Path
    split: Splitter
    kind: Kind
    size: int | None = None
    row_bytes: int = 0

    @property
    def name(self) -> str:
        return shown(self.path)

    @property
    def _compressed(self) -> bool:
        return self.path.suffix in COMPRESSED

    def units(self) -> Units:
        """Ranges of bytes; of an archive its frames, or all of it. Raises DataError where the file
        can't be read."""
        with open_unchanged(self.path, self.size) as file:
            size = file.seek(0, io.SEEK_END)
            if not self._compressed:
                return EqualUnits(size, self.row_bytes or UNIT_BYTES)
            everything = Unit(0, size, size * UNFOLDS)
            if size <= SMALL_ARCHIVE:
                return ListedUnits([everything])
            if self.path.suffix == ".zst" and not self.row_bytes:
                try:
                    return frame_units(file)
                except OSError as error:
                    raise self._unreadable(error) from error
            return ListedUnits([everything], whole=True)

    def rows(self, unit: Unit | None = None) -> Iterator[Raw]:
        """The rows of a unit; addresses count from its beginning in archives, else from the file's.

        Damage ends the unit with an Unreadable row, behind all text in front of it. Raises
        DataError when the file can't be opened, has changed or the disk fails, since a later
        attempt may succeed and must then see the same rows.
        """
        try:
            with ExitStack() as stack:
                file = stack.enter_context(open_unchanged(self.path, self.size))
                size = file.seek(0, io.SEEK_END)
                unit = unit or Unit(0, size, size)
                if self._compressed:
                    yield from self._unpacked_rows(file, unit, size, stack)
                else:
                    yield from self._plain_rows(file, unit, size)
                check_unchanged(file, self.path, self.size)
        except MemoryError as error:
            raise DataError(
                f"{self.name}: there is not enough memory to read it. Use fewer data.streams, or "
                "a machine with more memory."
            ) from error
        except OSError as error:
            raise self._unreadable(error) from error

    def row_count(self, unit: Unit) -> int | None:
        return None

    def place(self, unit: Unit, address: int) -> str:
        if not self._compressed or unit.start == 0:
            return f"byte {address:,}"
        return f"byte {address:,} of the text behind byte {unit.start:,}"

    def _plain_rows(self, file: Any, unit: Unit, size: int) -> Iterator[Raw]:
        file.seek(unit.start)
        length, none = unit.end - unit.start, True
        for value, address, _ in self.split(file, Extent(unit.start == 0, lambda: length)):
            none = False
            yield Raw(value, unit.start + address)
        if none and length == size:
            yield Raw(NoRows(), 0)

    def _unpacked_rows(self, file: Any, unit: Unit, size: int, stack: ExitStack) -> Iterator[Raw]:
        unpacked = Decompressed(file, codec(self.path.suffix), unit.start, unit.end)
        stream: Any = stack.enter_context(io.BufferedReader(unpacked, 1 << 17))
        none, cut, end = True, 0, 0
        for value, address, _ in self.split(
            stream, Extent(unit.start == 0, lambda: unpacked.boundary)
        ):
            none = False
            if unpacked.damage and not stream.peek(1):
                value, cut = _without_cut_character(value)
                if value == b"":
                    break
            end = address + (len(value) if isinstance(value, bytes) else 0)
            yield Raw(value, address)
        damage = unpacked.damage
        if damage and (damage.offset < unit.end or unit.end == size):
            passed = self._passed_behind(file, unit.end, size) if unit.end < size else 0
            yield Raw(_damaged(damage, cut, passed), end)
        elif none and unit.start == 0 and unit.end == size:
            yield Raw(NoRows(), 0)

    def _passed_behind(self, file: Any, start: int, size: int) -> int:
        """Bytes of text that the unit which begins at `start` leaves to the one before it."""
        unpacked = Decompressed(file, codec(self.path.suffix), start, size)
        stream: Any = io.BufferedReader(unpacked, 1 << 17)
        with stream:
            first = next(self.split(stream, Extent(False, lambda: None)), None)
        return unpacked.produced if first is None else first.address

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"{self.name}: can't be read: {error.strerror or error}.")


def _damaged(damage: Damage, cut: int, passed: int) -> Unreadable:
    detail = str(damage)
    if cut:
        detail += f"; a cut character before it ({counted(cut, 'byte')}) is dropped"
    if passed:
        detail += f"; the rest of a row behind it ({counted(passed, 'byte')}) is dropped"
    return Unreadable(DAMAGED, detail, text_bytes=cut + passed, file_bytes=damage.lost)


def _without_cut_character(raw: object) -> tuple[object, int]:
    """The last row before damage, which may end within a character; how many bytes that takes."""
    cut = incomplete_tail(raw) if isinstance(raw, bytes) else 0
    return (raw[:-cut], cut) if cut and isinstance(raw, bytes) else (raw, 0)
