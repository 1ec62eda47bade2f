"""What a source's files hold, read without megapipe: gzip, zstd and Arrow's own libraries.

Each file is a list of rows, and the rows of a text file are all of its bytes: what is not in one
is a fault of this module.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Verdict = Literal["good", "bad", "blank", "empty"]
"""A blank line stands between rows; an empty row is one that holds no text."""


@dataclass(frozen=True)
class Row:
    """`raw` is the row with its line end; `text` what is to be trained on, if it is good."""

    raw: bytes
    verdict: Verdict
    text: str = ""


@dataclass(frozen=True)
class File:
    """The rows of a file. `whole` is False where its compressed form is damaged: they are then
    those of the text in front of the damage. `cut` bytes at its end begin a character."""

    path: Path
    rows: tuple[Row, ...]
    whole: bool = True
    cut: int = 0

    @property
    def size(self) -> int:
        """Decompressed bytes; for a table, those of its texts."""
        return sum(len(row.raw) for row in self.rows) + self.cut


def read_file(path: Path, documents: str) -> File:
    """The rows of a file, by the rules of docs/data.md."""
    suffixes = path.suffixes
    if suffixes[-1] in (".parquet", ".arrow"):
        return File(path, tuple(_table_rows(path)))
    data, whole = path.read_bytes(), True
    if suffixes[-1] == ".gz":
        data, whole = unzip(data)
    elif suffixes[-1] == ".zst":
        data, whole = unpack_zstd(data)
    cut = 0 if whole else _cut_character(data)
    data = data[: len(data) - cut]
    if {".jsonl", ".ndjson", ".json"} & set(suffixes):
        return File(path, tuple(map(_json_row, _lines(data))), whole, cut)
    splitters = {"file": _file, "line": _lines, "blank-line": _paragraphs}
    rows = [_text_row(raw) for raw in splitters[documents](data)]
    if documents == "file":
        rows = [replace(row, verdict="empty") if row.verdict == "blank" else row for row in rows]
    return File(path, tuple(rows), whole, cut)


def unzip(data: bytes) -> tuple[bytes, bool]:
    """All that can be had from the members of a gzip file; whether that is all of it.

    One byte goes in at a time, so that nothing before the damage is missed.
    """
    out = bytearray()
    while data:
        member = zlib.decompressobj(wbits=31)
        for at in range(len(data)):
            try:
                out += member.decompress(data[at : at + 1])
            except zlib.error:
                return bytes(out), False
            if member.eof:
                break
        if not member.eof:
            return bytes(out) + member.flush(), False
        data = data[at + 1 :]
        if not data.strip(b"\0"):  # zeros behind the last member are padding, to gzip as well
            break
    return bytes(out), True


def unpack_zstd(data: bytes) -> tuple[bytes, bool]:
    """All that can be had from the frames of a zstd file; whether that is all of it."""
    import zstandard

    out = bytearray()
    while data:
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        for at in range(len(data)):
            try:
                out += frame.decompress(data[at : at + 1])
            except zstandard.ZstdError:
                return bytes(out), False
            if frame.eof:
                break
        if not frame.eof:
            return bytes(out), False
        data = data[at + 1 :]
    return bytes(out), True


def _cut_character(data: bytes) -> int:
    """How many bytes at the end begin a character of UTF-8 that is not there in full."""
    for size in (1, 2, 3):
        try:
            data[len(data) - size :].decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return size
    return 0


def _file(data: bytes) -> Iterator[bytes]:
    if data:
        yield data


def _lines(data: bytes) -> Iterator[bytes]:
    """Lines end with LF alone, whatever else splitlines takes for an end."""
    parts = data.split(b"\n")
    yield from (part + b"\n" for part in parts[:-1])
    if parts[-1]:
        yield parts[-1]


def _paragraphs(data: bytes) -> Iterator[bytes]:
    """Runs of lines that are not blank; each run of blank lines is a piece of its own."""
    run = b""
    for line in _lines(data):
        if run and bool(line.strip()) != bool(run.strip()):
            yield run
            run = b""
        run += line
    if run:
        yield run


def _text_row(raw: bytes) -> Row:
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        return Row(raw, "bad")
    if not text.strip():
        return Row(raw, "blank")
    return Row(raw, "good", text)


def _json_row(raw: bytes) -> Row:
    row = _text_row(raw)
    if row.verdict != "good":
        return row
    try:
        value = json.loads(row.text)
    except (ValueError, RecursionError):
        return Row(raw, "bad")
    text = value.get("text") if isinstance(value, dict) else None
    return Row(raw, *_judge(text))


def _table_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        values = pq.ParquetFile(path).read()["text"].to_pylist()
    else:
        data = path.read_bytes()
        opener = pa.ipc.open_file if data.startswith(b"ARROW1") else pa.ipc.open_stream
        values = opener(data).read_all()["text"].to_pylist()
    for value in values:
        yield Row((value or "").encode(), *_judge(value))


def _judge(text: object) -> tuple[Verdict, str]:
    if not isinstance(text, str):
        return "bad", ""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "bad", ""
    return ("good", text) if text.strip() else ("empty", "")
