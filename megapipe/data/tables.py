"""Rows of tables: one column of a Parquet or Arrow file, or of a shard on the hub.

Local tables are read with pyarrow, from the very file and without any other. `datasets` would take
the name for a pattern and ask a server on the network at each opening; it reads the hub.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megapipe.amounts import counted
from megapipe.data.files import check_unchanged, open_unchanged
from megapipe.data.formats import DAMAGED, Kind, NoRows, Raw, Unreadable
from megapipe.errors import DataError
from megapipe.files import reason, shown

BATCH_ROWS = 256


@dataclass(frozen=True)
class LocalTable:
    """One column of a file of `form` parquet or arrow; strings come as their bytes, unjudged."""

    path: Path
    form: str
    column: str
    size: int | None = None
    kind: Kind = "text"
    seekable: bool = False

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
        kind = schema.field(self.column).type
        if not _holds_text(kind):
            raise DataError(
                f"{self.name}: the column {self.column!r} is {kind}, not text; set text_field of "
                "this source to another, or take the file out of it."
            )

    def rows(self, row: int, offset: int) -> Iterator[Raw]:
        """Rows from `row` on, whatever the offset. Damage ends the file with an Unreadable row.

        Raises DataError where the disk fails or the file is not the one found at the start.
        """
        import pyarrow as pa

        number, read = row, _Read()
        with open_unchanged(self.path, self.size) as file:
            try:
                for values in _batches(file, self.form, self.column, row, read):
                    for value in values:
                        number += 1
                        yield value, 0
            except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
                check_unchanged(file, self.path, self.size)
                _raise_failure(self.name, error)
                yield _damage(error, number, read, file.seek(0, 2)), 0
                return
            check_unchanged(file, self.path, self.size)
        if number == 0:
            yield NoRows(), 0


@dataclass(frozen=True)
class HubShard:
    """One shard of a streaming dataset of `datasets`."""

    name: str
    open: Callable[[], Any]
    column: str
    kind: Kind = "text"
    seekable: bool = False

    def rows(self, row: int, offset: int) -> Iterator[Raw]:
        """Rows from `row` on. Raises DataError where the hub or the network fails.

        Only what decoders raise counts as damage. The rest is a failure, whatever its type: each
        back end of `datasets` has errors of its own for the network, ValueErrors among them.
        """
        import pyarrow as pa

        damage = (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeDecodeError, EOFError, zlib.error)
        try:
            for table in self.open().skip(row).with_format("arrow").iter(batch_size=BATCH_ROWS):
                for chunk in table[self.column].chunks:
                    for value in _values(chunk):
                        yield value, 0
        except (*damage, gzip.BadGzipFile) as error:
            yield Unreadable(DAMAGED, first_line(error)), 0
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

    `rows` it has in all, 0 where its format doesn't say; its `good_bytes` lie in front of damage.
    """

    opened: bool = False
    rows: int = 0
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


def _damage(error: Exception, number: int, read: _Read, size: int) -> Unreadable:
    bytes_lost = 0
    if not read.opened:
        bytes_lost, lost = size, f"none of its {counted(size, 'byte')} can be read"
    elif read.rows > 0:
        lost = f"{read.rows - number:,} of its {counted(read.rows, 'row')} can't be read"
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


def _batches(
    file: BinaryIO, form: str, column: str, row: int, read: _Read
) -> Iterator[list[object]]:
    """The values of rows from `row` on. Tells `read` what it learns of the file."""
    if form == "parquet":
        from pyarrow.parquet import ParquetFile

        table = ParquetFile(file)
        read.opened, read.rows = True, table.metadata.num_rows
        return _parquet_batches(table, column, row)
    return _arrow_batches(file, column, row, read)


def _parquet_batches(table: Any, column: str, row: int) -> Iterator[list[object]]:
    """Row groups before `row` are passed over unread. No threads: ranks are forked."""
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row >= rows:
            row -= rows
            continue
        for batch in table.iter_batches(
            BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False
        ):
            skipped = min(row, len(batch))
            row -= skipped
            yield _values(batch.column(batch.schema.get_field_index(column)).slice(skipped))


def _arrow_batches(file: BinaryIO, column: str, row: int, read: _Read) -> Iterator[list[object]]:
    """Of the file format (random access) and the stream format, which `datasets` writes."""
    import pyarrow as pa

    index = _schema(file, "arrow").get_field_index(column)
    file.seek(0)
    options = pa.ipc.IpcReadOptions(included_fields=[index], use_threads=False)
    for batch in _record_batches(file, options, read):
        values = _validated(batch.column(0))
        read.good_bytes = max(read.good_bytes, file.tell())
        skipped = min(row, len(values))
        row -= skipped
        for start in range(skipped, len(values), BATCH_ROWS):
            yield _values(values.slice(start, BATCH_ROWS))


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
