"""From the bytes of a text file to raw rows: lines, paragraphs or segments of it.

A unit of a file begins anywhere, often within a row, and every row must belong to one unit whatever
unit is read first. So a row belongs to the unit that holds the byte in front of it:

    lines       the unit in which the line before it ends; the first line of a file to its first
    paragraphs  the unit in which the blank line right before it begins
    segments    the unit in which it begins, once each border is moved to the next line end

Text is cut from bytes by this module and not by `datasets`: its JSON builder ends at the first
malformed line, its text builder turns CR into LF and reads a long line whole, and both stop at
bytes that are not UTF-8.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megapipe.amounts import counted

BLOCK_BYTES = 4 << 20
"""A document longer than this is cut, so that memory does not depend on the corpus."""

MAX_LINE_BYTES = 256 << 20
"""A JSON line has to be held whole: one longer than this is a bad row. Lines of text are cut."""

LINE_SLACK = 64 << 10
"""How far past a border we look for the end of the line."""

PASSED_OVER = 1 << 20
"""Bytes read at once where they are not wanted."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a row, or for the rest of a unit, that can't be had.

    `text_bytes` of text are dropped with it, and `file_bytes` of the file could not be read.
    """

    reason: str
    detail: str = ""
    text_bytes: int = 0
    file_bytes: int = 0


class Raw(NamedTuple):
    """A row as it stands in the file, and its address there: what tells it from other rows of the
    file. For text that is the byte at which it begins, in tables its number from 0. `id` is the
    value of the source's id_field in tables that are read with one."""

    value: object
    address: int
    id: object = None


@dataclass(frozen=True)
class Extent:
    """Where a unit ends. `first`: it begins the file. `boundary` gives the number of bytes in it,
    None while no byte behind it has been read."""

    first: bool
    boundary: Callable[[], int | None]

    def holds(self, position: int) -> bool:
        """Whether a row that begins at `position` (which has been read up to) is the unit's."""
        boundary = self.boundary()
        return boundary is None or position <= boundary


Splitter = Callable[[io.BufferedReader, Extent], Iterator[Raw]]
"""Gives the rows of a unit; the stream stands at its beginning, where addresses count from."""


def split_lines(stream: io.BufferedReader, extent: Extent) -> Iterator[Raw]:
    """One row a line, its line end included; one longer than MAX_LINE_BYTES can't be had."""
    position = 0 if extent.first else _pass_line(stream, 0, extent)
    while extent.holds(position) and (line := stream.readline(MAX_LINE_BYTES)):
        start, size = position, len(line)
        if size < MAX_LINE_BYTES or line.endswith(b"\n"):
            position += size
            yield Raw(line, start)
            continue
        while rest := stream.readline(PASSED_OVER):
            size += len(rest)
            if rest.endswith(b"\n"):
                break
        position += size
        reason = f"longer than {MAX_LINE_BYTES >> 20} MiB"
        yield Raw(Unreadable(reason, counted(size, "byte"), text_bytes=size), start)


def split_text_lines(stream: io.BufferedReader, extent: Extent) -> Iterator[Raw]:
    """One row a line, its line end included, cut where it exceeds MAX_LINE_BYTES."""
    position = 0 if extent.first else _pass_line(stream, 0, extent)
    begins = True
    if not extent.holds(position):
        return
    for line in _lines(stream, MAX_LINE_BYTES):
        if begins and not extent.holds(position):
            return
        yield Raw(line, position)
        position += len(line)
        begins = line.endswith(b"\n")


def split_paragraphs(stream: io.BufferedReader, extent: Extent) -> Iterator[Raw]:
    """One row a run of lines between blank lines, cut where it exceeds BLOCK_BYTES."""
    position = 0 if extent.first else _pass_line(stream, 0, extent)
    ours, whole_line = extent.first, True
    lines: list[bytes] = []
    start = size = 0
    for line in _lines(stream, BLOCK_BYTES):
        begin, position = position, position + len(line)
        blank = whole_line and line.endswith(b"\n") and not line.strip()
        whole_line = line.endswith(b"\n")
        if blank or not line.strip():
            if lines:
                yield Raw(b"".join(lines), start)
                lines, size = [], 0
            ours = extent.holds(begin) if blank else ours
        elif ours:
            start = start if lines else begin
            lines.append(line)
            size += len(line)
            cut = len(line) > BLOCK_BYTES - 4 and not whole_line
            if cut or size >= BLOCK_BYTES:
                yield Raw(b"".join(lines), start)
                lines, size = [], 0
        if not ours and not extent.holds(begin):
            return
    if lines:
        yield Raw(b"".join(lines), start)


def split_segments(stream: io.BufferedReader, extent: Extent, size: int) -> Iterator[Raw]:
    """The whole file as one row; above `size` bytes it is cut at the first line end behind each
    multiple of `size`, or there between characters where no line ends within LINE_SLACK.

    A unit has to begin at a multiple of `size`.
    """
    ahead = b""  # read, and not given yet
    position = 0
    if not extent.first:
        passed, ahead = _to_border(stream, b"")
        position = len(passed)
    border = size
    while extent.holds(border - size) and (border == size or extent.boundary() != border - size):
        ahead += _read(stream, border - position - len(ahead))
        inside = max(0, border - position)
        data, ahead = ahead[:inside], ahead[inside:]
        if position + len(data) == border:
            more, ahead = _to_border(stream, ahead)
            data += more
        if data:
            yield Raw(data, position)
        position += len(data)
        if not ahead and not stream.peek(1):
            return
        border += size


def _to_border(stream: io.BufferedReader, ahead: bytes) -> tuple[bytes, bytes]:
    """What belongs to the segment in front of a border, and what was read of the next one. `ahead`
    was read behind the border before."""
    end = ahead.find(b"\n", 0, LINE_SLACK) + 1
    if end:
        return ahead[:end], ahead[end:]
    line = ahead + stream.readline(LINE_SLACK - len(ahead))
    if line.endswith(b"\n") or len(line) < LINE_SLACK:
        return line, b""
    start = next((place for place in range(4) if line[place] & 0xC0 != 0x80), 0)
    return line[:start], line[start:]


def _read(stream: io.BufferedReader, count: int) -> bytes:
    return stream.read(count) if count > 0 else b""


def _pass_line(stream: io.BufferedReader, position: int, extent: Extent) -> int:
    """Goes to the next line; no further than it must to see that none begins in the unit."""
    while part := stream.readline(PASSED_OVER):
        position += len(part)
        if part.endswith(b"\n") or not extent.holds(position):
            break
    return position


def _lines(stream: io.BufferedReader, limit: int) -> Iterator[bytes]:
    """Lines with their ends; longer ones in parts of at most `limit` bytes, of whole characters."""
    carry = b""
    while line := carry + stream.readline(limit - len(carry)):
        carry = b""
        tail = 0 if len(line) < limit else incomplete_tail(line)
        if tail and stream.peek(1):
            line, carry = line[:-tail], line[-tail:]
        yield line


def incomplete_tail(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character without finishing it."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if needed > back else 0
    return 0
