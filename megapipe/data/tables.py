"""Rows of tables: one column of a Parquet or Arrow file, or of a shard on the hub.

Local tables are read with pyarrow, from the very file and without any other. `datasets` would take
the name for a pattern and ask a server on the network at each opening; it reads the hub.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO

from megapipe.amounts import counted
from megapipe.data.arrow_index import arrow_head, arrow_units
from megapipe.data.files import check_unchanged, open_unchanged
from megapipe.data.formats import DAMAGED, Kind, NoRows
from megapipe.data.splitters import Raw, Unreadable
from megapipe.data.units import ListedUnits, Unit, Units
from megapipe.errors import DataError
from megapipe.files import reason, shown

BATCH_ROWS = 256

Values = tuple[list[object], list[object]]
"""Of a batch: the texts, and the ids where they are read."""


@dataclass(frozen=True)
class LocalTable:
    """One column of a file of `form` parquet or arrow; strings come as their bytes, unjudged."""

    path: Path
    form: str
    column: str
    size: int | None = None
    kind: Kind = "text"
    row_bytes: int = 0
    id_column: str | None = None

    @property
    def name(self) -> str:
        return shown(self.path)

    def check(self) -> None:
        """Raises DataError where there is no such column, or it can't hold text.

        A damaged file passes: its rows are judged when they are read.
        """
        import pyarrow as pa

        with open_unchanged(self.path, self.size) as file:
            try:
                schema = _schema(file, self.form)
            except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
                _raise_failure(self.name, error)
                return
        names = schema.names.count(self.column)
        if names == 0:
            raise DataError(
                f"{self.name}: there is no column {self.column!r}. Set text_field of this source "
                f"to the column with the text (there are: {', '.join(schema.names)}), or take the "
                "file out of it."
            )
        if names > 1:
            raise DataError(f"{self.name}: {names} columns are called {self.column!r}; rename one.")
        if self.id_column is not None and schema.names.count(self.id_column) != 1:
            raise DataError(
                f"{self.name}: there is no column {self.id_column!r}. Set id_field of this source "
                f"to the column that names a row (there are: {', '.join(schema.names)}), or take "
                "it out."
            )
        kind = schema.field(self.column).type
        if not _holds_text(kind):
            raise DataError(
                f"{self.name}: the column {self.column!r} is {kind}, not text; set text_field of "
                "this source to another, or take the file out of it."
            )

    def units(self) -> Units:
        """Row groups or record batches; one unit where the file is damaged."""
        import pyarrow as pa

        with open_unchanged(self.path, self.size) as file:
            try:
                if self.form == "parquet":
                    return _row_groups(_parquet_metadata(self.path, _stamp(file)), self.column)
                return arrow_units(file)
            except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
                _raise_failure(self.name, error)
                size = file.seek(0, io.SEEK_END)
                return ListedUnits([Unit(0, 0, size)])

    def rows(self, unit: Unit | None = None) -> Iterator[Raw]:
        """The rows of a unit. Damage ends it with an Unreadable row.

        Raises DataError where the disk fails or the file is not the one found at the start.
        """
        if unit is None:
            return chain.from_iterable(self.rows(part) for part in self.units())
        return self._unit_rows(unit)

    def row_count(self, unit: Unit) -> int | None:
        return unit.end - unit.start or None

    def place(self, unit: Unit, address: int) -> str:
        return f"row {address + 1:,}"

    def _unit_rows(self, unit: Unit) -> Iterator[Raw]:
        import pyarrow as pa

        number, read = unit.start, _Read()
        with open_unchanged(self.path, self.size) as file:
            try:
                for values, ids in self._batches(file, unit, read):
                    for value, id_ in zip(values, ids or repeat(None, len(values)), strict=True):
                        yield Raw(value, number, id_)
                        number += 1
            except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
                check_unchanged(file, self.path, self.size)
                _raise_failure(self.name, error)
                size = file.seek(0, io.SEEK_END)
                yield Raw(_damage(error, unit, number, read, size), number)
                return
            check_unchanged(file, self.path, self.size)
        if number == 0:
            yield Raw(NoRows(), 0)

    def _batches(self, file: BinaryIO, unit: Unit, read: "_Read") -> Iterator[Values]:
        """The values of a unit's rows. Tells `read` what it learns of the file."""
        columns = [self.column, *([self.id_column] if self.id_column else [])]
        if self.form != "parquet":
            return _arrow_batches(file, columns, unit, read)
        metadata = _parquet_metadata(self.path, _stamp(file))
        read.opened = True
        return _parquet_batches(file, metadata, columns, unit)


@dataclass(frozen=True)
class HubShard:
    """One shard of a streaming dataset of `datasets`."""

    name: str
    open: Callable[[], Any]
    column: str
    kind: Kind = "text"
    row_bytes: int = 0

    @property
    def path(self) -> Path:
        return Path(self.name)

    def units(self) -> Units:
        """One, which is read from its beginning: each look at it is a download."""
        return ListedUnits([Unit(0, 0, 0)], whole=True)

    def row_count(self, unit: Unit) -> int | None:
        return None

    def place(self, unit: Unit, address: int) -> str:
        return f"row {address + 1:,}"

    def rows(self, unit: Unit | None = None) -> Iterator[Raw]:
        """All rows. Raises DataError where the hub or the network fails.

        Only what decoders raise counts as damage. The rest is a failure, whatever its type: each
        back end of `datasets` has errors of its own for the network, ValueErrors among them.
        """
        import pyarrow as pa

        damage = (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeDecodeError, EOFError, zlib.error)
        number = 0
        try:
            for table in self.open().with_format("arrow").iter(batch_size=BATCH_ROWS):
                for chunk in table[self.column].chunks:
                    for value in _values(chunk):
                        yield Raw(value, number)
                        number += 1
        except (*damage, gzip.BadGzipFile) as error:
            yield Raw(Unreadable(DAMAGED, first_line(error)), number)
        except KeyError:
            raise DataError(
                f"{self.name}: there is no column {self.column!r}; set text_field of this source."
            ) from None
        except Exception as error:
            raise DataError(f"{self.name}: can't be read: {first_line(error)}.") from error


def first_line(error: BaseException) -> str:
    """What an error says, without the lines behind the first and its full stop."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@dataclass
class _Read:
    """What is known of a table before it ends or is damaged.

    Its `good_bytes` lie in front of damage; a unit that is one record batch takes `stored` bytes.
    """

    opened: bool = False
    stored: int = 0
    good_bytes: int = 0


def _raise_failure(name: str, error: Exception) -> None:
    """Raises DataError for what is not the file's fault: the disk, memory, limits of pyarrow.

    pyarrow's OSErrors of damage have no number.
    """
    import pyarrow as pa

    if isinstance(error, OSError) and error.errno is not None:
        raise DataError(f"{name}: can't be read: {reason(error)}") from error
    if isinstance(error, MemoryError):
        raise DataError(
            f"{name}: there is not enough memory to read it ({first_line(error)}). Write it anew "
            "with smaller batches; if it is damaged, take it out of this source."
        ) from error
    if isinstance(error, pa.ArrowNotImplementedError):
        raise DataError(
            f"{name}: pyarrow can't read it ({first_line(error)}). Write it anew with plain "
            "strings; if it is damaged, take it out of this source."
        ) from error


def _damage(error: Exception, unit: Unit, number: int, read: _Read, size: int) -> Unreadable:
    """What is lost from row `number` on, in a file of `size` bytes."""
    bytes_lost = 0
    if not read.opened:
        bytes_lost, lost = size, f"none of its {counted(size, 'byte')} can be read"
    elif unit.end > unit.start:
        bytes_lost = read.stored
        lost = f"its rows {number + 1:,} to {unit.end:,} can't be read"
    else:
        bytes_lost = size - read.good_bytes
        lost = f"{counted(bytes_lost, 'byte')} with its rows from {number + 1:,} on can't be read"
    return Unreadable(DAMAGED, f"{lost} ({first_line(error)})", file_bytes=bytes_lost)


def _schema(file: BinaryIO, form: str) -> Any:
    import pyarrow as pa
    from pyarrow.parquet import read_schema

    if form == "parquet":
        return read_schema(file)
    return (pa.ipc.open_file if _is_ipc_file(file) else pa.ipc.open_stream)(file).schema


Stamp = tuple[int, int, int]
"""What changes with a file: its inode, size and time of change."""


def _stamp(file: BinaryIO) -> Stamp:
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=32)
def _parquet_metadata(path: Path, stamp: Stamp) -> Any:
    """The footer of a file, which takes milliseconds to parse where it has many row groups."""
    from pyarrow.parquet import read_metadata

    with path.open("rb") as file:
        return read_metadata(file)


def _row_groups(metadata: Any, column: str) -> ListedUnits:
    """A unit for each row group; its offset is the group's number."""
    index = [field.name for field in metadata.schema.to_arrow_schema()].index(column)
    name = metadata.schema.to_arrow_schema().names[index]
    units: list[Unit] = []
    row = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = sum(
            part.total_uncompressed_size
            for part in map(group.column, range(group.num_columns))
            if part.path_in_schema.split(".")[0] == name
        )
        units.append(Unit(row, row + group.num_rows, size, number))
        row += group.num_rows
    return ListedUnits([unit for unit in units if unit.end > unit.start])


def _parquet_batches(
    file: BinaryIO, metadata: Any, columns: list[str], unit: Unit
) -> Iterator[Values]:
    """No threads: ranks are forked."""
    from pyarrow.parquet import ParquetFile

    if unit.end == unit.start:
        return
    table = ParquetFile(file, metadata=metadata)
    for batch in table.iter_batches(
        BATCH_ROWS, row_groups=[unit.offset], columns=columns, use_threads=False
    ):
        text, *ids = [batch.column(batch.schema.get_field_index(name)) for name in columns]
        yield _values(text), [value for part in ids for value in _values(part)]


def _arrow_batches(file: BinaryIO, columns: list[str], unit: Unit, read: _Read) -> Iterator[Values]:
    """Of the file format (random access) and the stream format, which `datasets` writes."""
    import pyarrow as pa

    part: Any = file
    file.seek(0)
    if unit.offset:
        part, read.stored = _one_batch(file, unit), unit.size
    schema = _schema(part, "arrow")
    part.seek(0)
    fields = [schema.get_field_index(name) for name in columns]
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    for batch in _record_batches(part, options, read):
        text, *ids = [
            _validated(batch.column(batch.schema.get_field_index(name))) for name in columns
        ]
        read.good_bytes = max(read.good_bytes, part.tell())
        for start in range(0, len(text), BATCH_ROWS):
            names = [value for part in ids for value in _values(part.slice(start, BATCH_ROWS))]
            yield _values(text.slice(start, BATCH_ROWS)), names


def _one_batch(file: BinaryIO, unit: Unit) -> BinaryIO:
    """A stream of the schema, the dictionaries and one record batch of a file of either format."""
    head = arrow_head(file)
    file.seek(unit.offset)
    return io.BytesIO(head + file.read(unit.size))


def _record_batches(file: BinaryIO, options: Any, read: _Read) -> Iterator[Any]:
    import pyarrow as pa

    if not _is_ipc_file(file):
        stream = pa.ipc.open_stream(file, options=options)
        read.opened = True
        yield from stream
        return
    reader = pa.ipc.open_file(file, options=options)
    read.opened = True
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _validated(values: Any) -> Any:
    """The same values, of type binary where they were strings. Raises ArrowInvalid for damage.

    The reader of Arrow files believes their offsets and indices: those of a damaged file point
    outside of the memory that holds it. Whether strings are UTF-8 is judged row by row, later.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(values.type):
        words = _words(_validated(values.dictionary))
        values.indices.validate(full=True)
        return pa.DictionaryArray.from_arrays(values.indices, words)  # checks their range
    binary = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    values = values.view(binary.get(values.type, values.type))
    values.validate(full=True)
    return values


def _is_ipc_file(file: BinaryIO) -> bool:
    magic = file.read(6)
    file.seek(0)
    return magic == b"ARROW1"


def _holds_text(kind: Any) -> bool:
    """Also binary, which may be UTF-8, and null, the type of a column without values."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_text(kind) or pa.types.is_null(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    strings = (pa.string(), pa.large_string(), pa.string_view())
    return kind in (*strings, pa.binary(), pa.large_binary(), pa.binary_view())


def _values(values: Any) -> list[object]:
    """Python's; strings as bytes, so that what is not UTF-8 is found where rows are judged."""
    import pyarrow as pa

    if pa.types.is_dictionary(values.type):
        values = _words(values.dictionary).take(values.indices)
    if _is_text(values.type):
        values = values.cast(pa.large_binary())
    found: list[object] = values.to_pylist()
    return found


def _words(dictionary: Any) -> Any:
    """A dictionary's values in a type that indices can choose from, which views are not."""
    import pyarrow as pa

    return dictionary.cast(pa.large_binary()) if _is_text(dictionary.type) else dictionary
