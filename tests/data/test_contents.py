"""A file that does not hold what its name says is refused before the work, with what to do."""

import bz2
import errno
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from megapipe.config import SourceConfig
from megapipe.data.contents import check_content, content_kind
from megapipe.data.sources import open_source
from megapipe.errors import DataError
from tests.data.samples import write

SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
TEXT = b"Some text about rivers and boats.\n" * 30


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(TEXT)
        archive.addfile(entry, io.BytesIO(TEXT))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return out.getvalue()


def gzipped(content: bytes) -> bytes:
    """Without the time, which would be in the name of a test that gets it."""
    return gzip.compress(content, mtime=0)


def opened(path: Path, form: str = "auto") -> None:
    open_source(SourceConfig(name="a", path=str(path), format=form), "data.sources[0]", 1)  # type: ignore[arg-type]


KINDS: dict[str, Callable[[], bytes]] = {
    "tar": tar,
    "zip": zipped,
    "gzip": lambda: gzipped(TEXT),
    "zstd": lambda: zstandard.compress(TEXT),
    "xz": lambda: lzma.compress(TEXT),
    "bzip2": lambda: bz2.compress(TEXT),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_archives_under_the_name_of_text(tmp_path: Path, kind: str, name: str) -> None:
    path = write(tmp_path / name, KINDS[kind]())
    inside = name.endswith((".gz", ".zst"))
    holds = f"holds {kind} data inside" if inside else f"is {kind} data and not text"
    with pytest.raises(DataError, match=rf"{name}: {holds}\. Unpack it"):
        opened(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_than_utf8(tmp_path: Path, encoding: str, name: str) -> None:
    path = write(tmp_path / name, ("\ufeff" + '{"text": "a"}\n' * 9).encode(encoding))
    with pytest.raises(DataError) as caught:
        opened(path)
    short = encoding.upper()[:6]
    assert f"{name}: is {short} text" in str(caught.value)
    assert f"iconv -f {short} -t UTF-8" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', "is one JSON array.*jq -c '.\\[\\]'"),
        ("a.json", b'\xef\xbb\xbf \n[\n  {\n "text": "a"}]', "is one JSON array"),
        (
            "a.json",
            b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n',
            "is JSON spread over many lines.*jq -c",
        ),
        ("a.parquet", b"<html>404</html>", r"is not Parquet.*begins with b'<html>40'"),
        ("a.parquet", b"PARE1234", "is encrypted Parquet"),
        ("a.txt.gz", TEXT, r"is not gzip.*begins with b'Some tex'"),
        ("a.txt.zst", gzipped(TEXT), r"is not zstd.*begins with b'\\x1f\\x8b"),
        ("a.arrow", TEXT, r"is not Arrow.*begins with b'Some tex'"),
        ("a.arrow", bytes(64), "is not Arrow"),
        # In members so short that each read gives one of them.
        ("a.jsonl.gz", gzipped(b"[") + gzipped(b'{"text": "a"}]'), "is one JSON array"),
    ],
)
def test_what_is_not_as_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {said}"):
        opened(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.txt.gz", b""),
        ("a.parquet", b""),
        ("a.txt.zst", SKIPPABLE_FRAME + zstandard.compress(TEXT)),  # as pzstd writes it
        ("a.txt", b"[{ is how it begins"),
        ("a.txt", b"\xef\xbb\xbfa"),
        ("a.txt", b"BZh and PK and PAR1 are words"),
        ("a.jsonl", b'["a row that is a list"]\n{"text": "a"}\n'),
        ("a.jsonl", b'{\n{"text": "behind a line that was cut"}\n'),
    ],
)
def test_what_is_let_through(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    opened(path)


def test_a_format_that_is_said_is_the_one_that_is_looked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.log", TEXT)
    opened(path, "text")
    with pytest.raises(DataError, match=r"a\.log: is not Parquet, as its name or this source's"):
        opened(path, "parquet")


def test_a_file_that_may_not_be_read_is_an_error_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", TEXT)

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, who may read all
    with pytest.raises(DataError, match=r"a\.txt: can't be read: Permission denied"):
        opened(path)


def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", TEXT)

    class Failing(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda self, mode: Failing(self, mode))
    with pytest.raises(DataError, match=r"a\.txt: can't be read: Input/output error\.$"):
        check_content(path, "text", len(TEXT))


def test_a_stream_of_arrow_before_0_15_is_let_through(tmp_path: Path) -> None:
    """It begins with the length of its schema and not with ff ff ff ff."""
    sink = pa.BufferOutputStream()
    schema = pa.schema([("text", pa.string())])
    options = pa.ipc.IpcWriteOptions(use_legacy_format=True)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        writer.write_batch(pa.record_batch([["a", "b"]], schema=schema))
    content = sink.getvalue().to_pybytes()
    assert not content.startswith(b"\xff")
    opened(write(tmp_path / "a.arrow", content))


def test_no_kind_is_seen_in_text() -> None:
    assert content_kind(TEXT * 20) is None
    assert content_kind(b"x" * 257 + b"ustar") == "tar"
