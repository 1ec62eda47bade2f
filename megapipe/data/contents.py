"""Does a file hold what its name says? Judged by its first bytes, before a run reads any of it.

Text has to be UTF-8. What has another encoding or is another kind of file would become rows of
noise, or many bad rows whose cause is hard to see.
"""

import io
import re
from pathlib import Path
from typing import BinaryIO

from megapipe.data.compressed import Decompressed, codec
from megapipe.data.files import COMPRESSED, open_unchanged
from megapipe.errors import DataError
from megapipe.files import shown

HEAD = 1024
UTF8_MARK = b"\xef\xbb\xbf"

ENCODINGS = {  # longer marks first: UTF-32 begins like UTF-16
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
SKIPPABLE = tuple(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))
MAGIC: dict[str, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b\x08",),
    "zstd": (b"\x28\xb5\x2f\xfd", *SKIPPABLE),
    "xz": (b"\xfd7zXZ\x00",),
    "bzip2": tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
    "lz4": (b"\x04\x22\x4d\x18",),
    "zip": (b"PK\x03\x04", b"PK\x05\x06"),
    "7z": (b"7z\xbc\xaf\x27\x1c",),
    "Parquet": (b"PAR1\x15",),
    "Arrow": (b"ARROW1\x00\x00",),
}
UNPACK = {"tar": "tar -xf", "zip": "unzip", "7z": "7z x", "xz": "xz -d", "bzip2": "bzip2 -d"}
TAR = (257, b"ustar")


def check_content(path: Path, form: str, size: int) -> None:
    """Raises DataError where a file can't be opened or is not of `form` (a value of FORMATS).

    An empty file passes, and so does one that is damaged further on: rows are judged one by one.
    """
    with open_unchanged(path, size) as file:
        head = _head(file, path)
        if not head:
            return
        if form == "parquet":
            _check_parquet(head, path)
        elif form == "arrow":
            _check_arrow(head, path, size)
        elif form in ("text", "jsonl"):
            kind, compressed = path.suffix.removeprefix("."), path.suffix in COMPRESSED
            if compressed:
                _check_compression(head, path, {"gz": "gzip", "zst": "zstd"}[kind])
                file.seek(0)
                head = _head(Decompressed(file, codec(path.suffix)), path)
            _check_text(head, path, form, inside=compressed)


def _head(file: BinaryIO | io.RawIOBase, path: Path) -> bytes:
    """The first bytes, fewer where they are damaged."""
    parts: list[bytes] = []
    try:
        while sum(map(len, parts)) < HEAD and (part := file.read(HEAD)):
            parts.append(part)
    except OSError as error:
        raise DataError(f"{shown(path)}: can't be read: {error.strerror or error}.") from error
    return b"".join(parts)


def _check_parquet(head: bytes, path: Path) -> None:
    if head.startswith(b"PARE"):
        raise DataError(f"{shown(path)}: is encrypted Parquet, which can't be read; decrypt it.")
    if not head.startswith(b"PAR1"):
        raise DataError(_not_as_named(path, "Parquet", head))


def _check_arrow(head: bytes, path: Path, size: int) -> None:
    """A file has ARROW1. A stream has ff ff ff ff, or (before Arrow 0.15) the length of its schema,
    which four bytes of text can't be: read as a number they are above 2**29."""
    length = int.from_bytes(head[:4], "little")
    old_stream = 0 < length < min(1 << 29, size)
    if not (head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or old_stream):
        raise DataError(_not_as_named(path, "Arrow", head))


def _check_compression(head: bytes, path: Path, name: str) -> None:
    if not head.startswith(MAGIC[name]):
        raise DataError(_not_as_named(path, name, head))


def _check_text(head: bytes, path: Path, form: str, *, inside: bool) -> None:
    for mark, encoding in ENCODINGS.items():
        if head.startswith(mark):
            raise DataError(
                f"{shown(path)}: is {encoding} text (it begins with the byte order mark "
                f"{mark.hex(' ').upper()}), and text has to be UTF-8. Convert it: "
                f"iconv -f {encoding} -t UTF-8 FILE > NEW."
            )
    kind = content_kind(head)
    if kind is not None:
        holds = f"holds {kind} data inside" if inside else f"is {kind} data and not text"
        unpack = f" (for example with `{UNPACK[kind]}`)" if kind in UNPACK else ""
        raise DataError(
            f"{shown(path)}: {holds}. Unpack it{unpack} and name the text files that come out, or "
            "give it the name of its format (.gz, .zst, .parquet, .arrow are read)."
        )
    if form == "jsonl":
        _check_lines(head.removeprefix(UTF8_MARK).lstrip(), path)


def _check_lines(head: bytes, path: Path) -> None:
    array = re.match(rb"\[\s*\{", head)
    if array or re.match(rb"\{\s*\n\s*\"", head):
        form = "one JSON array" if array else "JSON spread over many lines"
        flags = "-c '.[]'" if array else "-c ."
        raise DataError(
            f"{shown(path)}: is {form}, and JSONL has one object on each line. Convert it: "
            f"jq {flags} FILE > NEW.jsonl."
        )


def content_kind(head: bytes) -> str | None:
    """The kind of file that begins with `head`, where it is a known one and not text."""
    start, mark = TAR
    if head[start:].startswith(mark):
        return "tar"
    return next((kind for kind, marks in MAGIC.items() if head.startswith(marks)), None)


def _not_as_named(path: Path, name: str, head: bytes) -> str:
    return (
        f"{shown(path)}: is not {name}, as its name or this source's format says: it begins with "
        f"{head[:8]!r}. Replace the file, or name it by what it holds."
    )
