"""Raw rows of one file, from any row on. Nothing is decoded or judged here.

Text formats are cut from bytes by this module and not by `datasets`: its JSON builder ends at the
first malformed line, its text builder turns CR into LF and reads a long line whole, both stop at
bytes that are not UTF-8, and neither they nor fsspec notice a .zst file that is cut off. Tables
(Parquet, Arrow, the hub) are streamed through `datasets`.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megapipe.errors import DataError

BLOCK_BYTES = 4 << 20
"""A document longer than this is cut, so that memory does not depend on the corpus."""

MAX_LINE_BYTES = 256 << 20
"""A JSON line has to be held whole; one longer than this is a bad row."""

LINE_SLACK = 64 << 10
"""How far past a cut we look for the end of the line."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a row, or for the rest of a file, that can't be had."""

    reason: str


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
    """A file of bytes, perhaps compressed, cut into rows by `split`."""

    path: Path
    split: Splitter
    kind: Kind

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def seekable(self) -> bool:
        return self.path.suffix not in (".gz", ".zst")

    def rows(self, row: int, offset: int) -> Iterator[Raw]:
        """Rows from `row`, which begins at byte `offset` of the uncompressed text.

        Damage ends the file with an Unreadable row. Raises DataError when the file can't be opened
        or the disk fails, since a later attempt may succeed and must then see the same rows.
        """
        from zstandard import ZstdError

        empty = True
        try:
            with _open(self.path, offset) as stream:
                for raw in self.split(stream, offset):
                    empty = False
                    yield raw
        except (EOFError, zlib.error, gzip.BadGzipFile, ZstdError) as error:
            yield Unreadable(f"the rest of the file is damaged ({error})"), offset
            return
        except OSError as error:
            raise DataError(f"{self.path}: can't be read: {error.strerror or error}.") from error
        if empty and row == 0:
            yield Unreadable("empty file"), offset


@dataclass(frozen=True)
class TableFile:
    """One shard of a streaming dataset of `datasets`; its rows are the values of one column."""

    name: str
    open: Callable[[], Any]
    column: str
    kind: Kind = "text"
    seekable: bool = False

    def rows(self, row: int, offset: int) -> Iterator[Raw]:
        """Strings come as their bytes, so that bad UTF-8 is found out where rows are judged."""
        import pyarrow as pa
        from datasets.exceptions import DatasetsError

        try:
            tables = self.open().skip(row).with_format("arrow").iter(batch_size=256)
            for table in tables:
                values = table[self.column]
                if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                    values = values.cast(pa.large_binary())
                for value in values.to_pylist():
                    yield value, 0
        except (ValueError, pa.ArrowTypeError, EOFError) as error:
            yield Unreadable(f"the rest of the file is damaged ({_first_line(error)})"), 0
        except KeyError:
            raise DataError(
                f"{self.name}: there is no column {self.column!r}; set text_field of this source."
            ) from None
        except (OSError, DatasetsError) as error:
            raise DataError(f"{self.name}: can't be read: {_first_line(error)}.") from error


def split_lines(stream: io.BufferedReader, offset: int) -> Iterator[Raw]:
    """One row a line, its line end included."""
    while line := stream.readline(MAX_LINE_BYTES):
        offset += len(line)
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line, offset
            continue
        while rest := stream.readline(1 << 20):
            offset += len(rest)
            if rest.endswith(b"\n"):
                break
        yield Unreadable(f"longer than {MAX_LINE_BYTES >> 20} MiB"), offset


def split_paragraphs(stream: io.BufferedReader, offset: int) -> Iterator[Raw]:
    """One row a run of lines between blank lines, cut where it exceeds BLOCK_BYTES."""
    lines: list[bytes] = []
    size = 0
    while line := stream.readline(BLOCK_BYTES):
        offset += len(line)
        blank = not line.strip()
        if not blank:
            lines.append(line)
            size += len(line)
        if lines and (blank or size >= BLOCK_BYTES):
            yield b"".join(lines), offset
            lines, size = [], 0
    if lines:
        yield b"".join(lines), offset


def split_segments(stream: io.BufferedReader, offset: int, size: int) -> Iterator[Raw]:
    """The whole file as one row; above `size` bytes it is cut behind line ends."""
    carry = b""
    while True:
        data = carry + stream.read(size - len(carry))
        carry = b""
        if len(data) >= size:
            data += stream.readline(LINE_SLACK)
            if (tail := _incomplete_tail(data)) and stream.peek(1):
                data, carry = data[:-tail], data[-tail:]
        if not data:
            return
        offset += len(data)
        yield data, offset


def _incomplete_tail(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character without finishing it."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if needed > back else 0
    return 0


@contextmanager
def _open(path: Path, offset: int) -> Iterator[io.BufferedReader]:
    """The uncompressed bytes from `offset` on; costs reading up to there where compressed."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if path.suffix not in (".gz", ".zst"):
            file.seek(offset)
            yield file
            return
        raw: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else ZstdFile(file)
        stream = stack.enter_context(io.BufferedReader(stack.enter_context(raw), 1 << 17))
        while offset > 0 and (skipped := len(stream.read(min(offset, 1 << 20)))):
            offset -= skipped
        yield stream


class ZstdFile(io.RawIOBase):
    """Reads all frames of a .zst file and raises EOFError where the last one is cut off.

    zstandard's own stream reader ends without an error there. Input is fed in small pieces, which
    bounds what a hostile file can unfold to at once (about 32,000 times the piece).
    """

    PIECE = 4096

    def __init__(self, file: io.BufferedReader) -> None:
        import zstandard

        super().__init__()
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._input or self._file.read(self.PIECE)
            self._input = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("it is cut off")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
