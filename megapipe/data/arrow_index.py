"""Where the record batches of an Arrow file begin, found without reading them.

Both formats hold the same messages: a length, a FlatBuffers table that says what follows, and a
body (Arrow columnar format, "Encapsulated message format").
"""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from megapipe.data.units import ListedUnits, Unit

FILE_MAGIC = b"ARROW1"
CONTINUATION = 0xFFFFFFFF
RECORD_BATCH = 3
MAX_METADATA = 1 << 28
END, OLD_END = b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0"
PADDING = 64
SMALL = 4 << 20
"""A file up to this size is one unit whose rows are shuffled, whatever it holds."""


class Message(NamedTuple):
    """`start` and `end` of a message with its body, and `rows` of a record batch."""

    kind: int
    start: int
    end: int
    rows: int


def arrow_units(file: BinaryIO) -> ListedUnits:
    """A unit for each record batch with rows; its offset is where the batch begins.

    It is one unit, to be read from the beginning, where a dictionary comes behind a batch or the
    file is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    units: list[Unit] = []
    row = 0
    whole = False
    for message in _messages(file, size):
        if message.kind == RECORD_BATCH:
            stored = message.end - message.start
            units.append(Unit(row, row + message.rows, stored, message.start))
            row += message.rows
        else:
            whole |= bool(units)
    if whole or len(units) < 2 or not _ends_well(file, size):
        return ListedUnits([Unit(0, 0, size)], whole=size > SMALL)
    return ListedUnits([unit for unit in units if unit.end > unit.start])


def arrow_head(file: BinaryIO) -> bytes:
    """The messages in front of the first record batch: the schema and dictionaries."""
    first = end = None
    for message in _messages(file, os.fstat(file.fileno()).st_size):
        if message.kind == RECORD_BATCH:
            break
        first, end = message.start if first is None else first, message.end
    assert first is not None, "a unit of its own has a schema"
    assert end is not None
    file.seek(first)
    return file.read(end - first)


def _messages(file: BinaryIO, size: int) -> Iterator[Message]:
    """All messages in order, up to the mark of the end or to damage."""
    file.seek(0)
    file.seek(8 if file.read(6) == FILE_MAGIC else 0)
    while (message := _next_message(file, size)) is not None:
        yield message
        file.seek(message.end)


def _next_message(file: BinaryIO, size: int) -> Message | None:
    start = file.tell()
    length = _unsigned(file.read(4))
    if length == CONTINUATION:
        length = _unsigned(file.read(4))
    if not 0 < length < MAX_METADATA:
        file.seek(start)
        return None
    metadata = file.read(length)
    try:
        kind, body, rows = _parse(metadata)
    except (IndexError, ValueError):
        file.seek(start)
        return None
    end = file.tell() + body
    if len(metadata) < length or body < 0 or rows < 0 or end > size:
        file.seek(start)
        return None
    file.seek(end)
    return Message(kind, start, end, rows)


def _ends_well(file: BinaryIO, size: int) -> bool:
    """Whether behind the last message come the mark of the end and, in the file format, a footer
    that takes the rest: zeros in the place of a message look like that mark."""
    last = file.tell()
    rest = file.read(8)
    mark = 8 if rest == END else 4 if rest.startswith(OLD_END) else 0
    file.seek(0)
    if file.read(6) != FILE_MAGIC:
        return mark > 0 or not rest
    file.seek(max(0, size - 10))
    footer = _unsigned(file.read(4))
    return file.read(6) == FILE_MAGIC and 0 <= size - 10 - footer - mark - last < PADDING


def _parse(metadata: bytes) -> tuple[int, int, int]:
    """Kind, length of the body, and rows of a record batch. Raises ValueError for damage."""
    table = _unsigned(metadata[:4])
    kind_at, header_at, body_at = (_field(metadata, table, index) for index in (1, 2, 3))
    kind = metadata[kind_at] if kind_at else 0
    body = _signed(metadata, body_at) if body_at else 0
    if kind != RECORD_BATCH:
        return kind, body, 0
    if not header_at:
        raise ValueError("a record batch without a header")
    header = header_at + _unsigned(metadata[header_at : header_at + 4])
    rows_at = _field(metadata, header, 0)
    return kind, body, _signed(metadata, rows_at) if rows_at else 0


def _field(data: bytes, table: int, index: int) -> int:
    """Where a field of a FlatBuffers table lies; 0 if the table does not have it."""
    vtable = table - int.from_bytes(_part(data, table, 4), "little", signed=True)
    size = int.from_bytes(_part(data, vtable, 2), "little")
    entry = 4 + 2 * index
    if entry + 2 > size:
        return 0
    offset = int.from_bytes(_part(data, vtable + entry, 2), "little")
    return table + offset if offset else 0


def _signed(data: bytes, place: int) -> int:
    return int.from_bytes(_part(data, place, 8), "little", signed=True)


def _part(data: bytes, start: int, size: int) -> bytes:
    if start < 0 or start + size > len(data):
        raise ValueError("outside of the message")
    return data[start : start + size]


def _unsigned(data: bytes) -> int:
    return int.from_bytes(data, "little")
