"""Raw rows of a file of text, from any row on. Nothing is decoded or judged here.

Text is cut from bytes by this module and not by `datasets`: its JSON builder ends at the first
malformed line, its text builder turns CR into LF and reads a long line whole, and both stop at
bytes that are not UTF-8.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megapipe.amounts import counted
from megapipe.data.compressed import Damage, Decompressed, codec
from megapipe.data.files import COMPRESSED, check_unchanged, open_unchanged
from megapipe.errors import DataError
from megapipe.files import shown

BLOCK_BYTES = 4 << 20
"""A document longer than this is cut, so that memory does not depend on the corpus."""

MAX_LINE_BYTES = 256 << 20
"""A JSON line has to be held whole: one longer than this is a bad row. Lines of text are cut."""

LINE_SLACK = 64 << 10
"""How far past a cut we look for the end of the line."""

DAMAGED = "the rest of the file is damaged"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a row, or for the rest of a file, that can't be had.

    `text_bytes` of text are dropped with it, and `file_bytes` of the file could not be read.
    """

    reason: str
    detail: str = ""
    text_bytes: int = 0
    file_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NoRows:
    """The one row of a file that has none, so that each file is counted."""


Kind = Literal["json", "line", "text"]
"""How bytes become text: a JSON object's field, a line without its end, or all of them."""

Raw = tuple[object, int]
"""A row as it stands in the file, and the byte offset behind it (0 in tables)."""


class RowFile(Protocol):
    """One file of a source. `seekable`: a row is reached by its offset without reading up to it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def seekable(self) -> bool: ...
    def rows(self, row: int, offset: int) -> Iterator[Raw]: ...


Splitter = Callable[[io.BufferedReader, int], Iterator[Raw]]


@dataclass(frozen=True)
class TextFile:
    """A file of bytes, perhaps compressed, cut into rows by `split`. `size` is that of the file
    where it was found; None in tests of their own."""

    path: Path
    split: Splitter
    kind: Kind
    size: int | None = None

    @property
    def name(self) -> str:
        return shown(self.path)

    @property
    def seekable(self) -> bool:
        return self.path.suffix not in COMPRESSED

    def rows(self, row: int, offset: int) -> Iterator[Raw]:
        """Rows from `row`, which begins at byte `offset` of the uncompressed text.

        Damage ends the file with an Unreadable row, behind all text in front of it. Raises
        DataError when the file can't be opened, has changed or the disk fails, since a later
        attempt may succeed and must then see the same rows.
        """
        file = open_unchanged(self.path, self.size)
        end, first, cut = offset, row == 0, 0
        try:
            with ExitStack() as stack:
                stack.enter_context(file)
                unpacked = None
                stream: Any = file
                if self.path.suffix in COMPRESSED:
                    unpacked = Decompressed(file, codec(self.path.suffix))
                    stream = stack.enter_context(io.BufferedReader(unpacked, 1 << 17))
                _skip(stream, offset)
                for raw, end in self.split(stream, offset):
                    first = False
                    if unpacked and unpacked.damage and not stream.peek(1):
                        raw, cut = _without_cut_character(raw)
                        end -= cut
                        if not raw:
                            break
                    yield raw, end
                check_unchanged(file, self.path, self.size)
                if unpacked and unpacked.damage:
                    yield _damaged(unpacked.damage, cut), end
                elif first:
                    yield NoRows(), end
        except MemoryError as error:
            raise DataError(
                f"{self.name}: there is not enough memory to read it. Use fewer data.streams, or "
                "a machine with more memory."
            ) from error
        except OSError as error:
            raise DataError(f"{self.name}: can't be read: {error.strerror or error}.") from error


def _skip(stream: Any, offset: int) -> None:
    """Goes to `offset`; costs reading up to there where compressed."""
    if stream.seekable():
        stream.seek(offset)
        return
    while offset > 0 and (skipped := len(stream.read(min(offset, 1 << 20)))):
        offset -= skipped


def _damaged(damage: Damage, cut: int) -> Unreadable:
    detail = str(damage)
    if cut:
        detail += f"; a cut character before it ({counted(cut, 'byte')}) is dropped"
    return Unreadable(DAMAGED, detail, text_bytes=cut, file_bytes=damage.lost)


def _without_cut_character(raw: object) -> tuple[object, int]:
    """The last row before damage, which may end within a character; how many bytes that takes."""
    cut = incomplete_tail(raw) if isinstance(raw, bytes) else 0
    return (raw[:-cut], cut) if cut and isinstance(raw, bytes) else (raw, 0)


def split_lines(stream: io.BufferedReader, offset: int) -> Iterator[Raw]:
    """One row a line, its line end included; one longer than MAX_LINE_BYTES can't be had."""
    while line := stream.readline(MAX_LINE_BYTES):
        offset += len(line)
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line, offset
            continue
        size = len(line)
        while rest := stream.readline(1 << 20):
            size += len(rest)
            if rest.endswith(b"\n"):
                break
        offset += size - len(line)
        reason = f"longer than {MAX_LINE_BYTES >> 20} MiB"
        yield Unreadable(reason, counted(size, "byte"), text_bytes=size), offset


def split_text_lines(stream: io.BufferedReader, offset: int) -> Iterator[Raw]:
    """One row a line, its line end included, cut where it exceeds MAX_LINE_BYTES."""
    for line in _lines(stream, MAX_LINE_BYTES):
        offset += len(line)
        yield line, offset


def split_paragraphs(stream: io.BufferedReader, offset: int) -> Iterator[Raw]:
    """One row a run of lines between blank lines, cut where it exceeds BLOCK_BYTES."""
    lines: list[bytes] = []
    size = 0
    for line in _lines(stream, BLOCK_BYTES):
        offset += len(line)
        blank = not line.strip()
        if not blank:
            lines.append(line)
            size += len(line)
        cut = len(line) > BLOCK_BYTES - 4 and not line.endswith(b"\n")
        if lines and (blank or cut or size >= BLOCK_BYTES):
            yield b"".join(lines), offset
            lines, size = [], 0
    if lines:
        yield b"".join(lines), offset


def _lines(stream: io.BufferedReader, limit: int) -> Iterator[bytes]:
    """Lines with their ends; longer ones in parts of at most `limit` bytes, of whole characters."""
    carry = b""
    while line := carry + stream.readline(limit - len(carry)):
        carry = b""
        tail = 0 if len(line) < limit else incomplete_tail(line)
        if tail and stream.peek(1):
            line, carry = line[:-tail], line[-tail:]
        yield line


def split_segments(stream: io.BufferedReader, offset: int, size: int) -> Iterator[Raw]:
    """The whole file as one row; above `size` bytes it is cut behind line ends."""
    carry = b""
    while True:
        data = carry + stream.read(size - len(carry))
        carry = b""
        if len(data) >= size:
            data += stream.readline(LINE_SLACK)
            if (tail := incomplete_tail(data)) and stream.peek(1):
                data, carry = data[:-tail], data[-tail:]
        if not data:
            return
        offset += len(data)
        yield data, offset


def incomplete_tail(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character without finishing it."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if needed > back else 0
    return 0
