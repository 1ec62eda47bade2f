import gzip
import io
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megapipe.config import SourceConfig
from megapipe.data import formats
from megapipe.data.formats import RowFile, TextFile, Unreadable
from megapipe.data.sources import open_source
from megapipe.errors import DataError
from tests.data.samples import write

TEXT = b"one\n\n \ntwo\r\nthree\n\n\nfour \xc3\xa9\nlast without end"
SEGMENTS = partial(formats.split_segments, size=16)
SPLITTERS = {
    "lines": (formats.split_lines, TEXT.splitlines(keepends=True)),
    "paragraphs": (
        formats.split_paragraphs,
        [b"one\n", b"two\r\nthree\n", b"four \xc3\xa9\nlast without end"],
    ),
    "segments": (SEGMENTS, None),
}


def raws(file: RowFile, row: int = 0, offset: int = 0) -> list[object]:
    return [raw for raw, _ in file.rows(row, offset)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", SPLITTERS)
def test_rows_are_the_same_in_every_compression_and_from_every_row_on(
    tmp_path: Path, name: str, suffix: str
) -> None:
    split, expected = SPLITTERS[name]
    file = TextFile(write(tmp_path / f"a.txt{suffix}", TEXT), split, "text")
    rows = list(file.rows(0, 0))
    assert expected is None or [raw for raw, _ in rows] == expected
    for row, (_, offset) in enumerate(rows, start=1):
        assert list(file.rows(row, offset)) == rows[row:]


@given(st.text(alphabet="aé漢🎉\n", max_size=300), st.integers(4, 40))
def test_segments_lose_nothing_and_never_cut_a_character(text: str, size: int) -> None:
    stream = io.BufferedReader(io.BytesIO(text.encode()))  # type: ignore[arg-type]
    segments = [raw for raw, _ in formats.split_segments(stream, 0, size)]
    assert all(isinstance(segment, bytes) for segment in segments)
    assert "".join(segment.decode() for segment in segments) == text  # type: ignore[attr-defined]


def test_segments_without_line_ends_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LINE_SLACK", 10)
    file = TextFile(write(tmp_path / "a.txt", "é".encode() * 1000), SEGMENTS, "text")
    lengths = [len(raw) for raw in raws(file) if isinstance(raw, bytes)]
    assert sum(lengths) == 2000
    assert max(lengths) <= 16 + 10


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_frames_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.txt{suffix}", b"one\n")
    path.write_bytes(path.read_bytes() * 3)
    assert raws(TextFile(path, formats.split_lines, "line")) == [b"one\n"] * 3


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damage_ends_the_file_with_a_row_that_says_so(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    lines = b"".join(b"%d %d\n" % (n, n * n * 7919) for n in range(5000))
    path = write(tmp_path / f"a.txt{suffix}", lines)
    if suffix == ".zst":  # with a checksum, as the zstd program writes it
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(lines))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    last = raws(TextFile(path, formats.split_lines, "line"))[-1]
    assert isinstance(last, Unreadable)
    assert "the rest of the file is damaged" in last.reason


def test_a_line_above_the_limit_is_a_bad_row_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", b"x" * (3 << 20) + b"\nshort\n")
    first, second = raws(TextFile(path, formats.split_lines, "json"))
    assert first == Unreadable("longer than 1 MiB")
    assert second == b"short\n"


def test_an_empty_text_file_is_one_bad_row(tmp_path: Path) -> None:
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        file = TextFile(write(tmp_path / name, b""), formats.split_lines, "line")
        assert raws(file) == [Unreadable("empty file")]


def test_a_file_that_vanished_stops_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: can't be read: No such file"):
        raws(TextFile(tmp_path / "gone.txt", formats.split_lines, "line"))


def table_source(directory: Path, name: str, field: str = "text") -> RowFile:
    table = pa.table({"id": range(1000), "text": [f"row {n}" for n in range(1000)]})
    path = directory / name
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=100)
    elif name.endswith(".stream.arrow"):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=100)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table, max_chunksize=100)
    source = open_source(SourceConfig(path=str(path), text_field=field), "data.sources[0]", 1)
    return source.files[0]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.stream.arrow"])
def test_tables_are_read_from_any_row_on(tmp_path: Path, name: str) -> None:
    file = table_source(tmp_path, name)
    assert raws(file) == [b"row %d" % n for n in range(1000)]
    assert raws(file, 350) == [b"row %d" % n for n in range(350, 1000)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_missing_column_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"a\.\w+: there is no column 'body'; set text_field"):
        raws(table_source(tmp_path, name, field="body"))


def test_a_damaged_table_ends_with_a_row_that_says_so(tmp_path: Path) -> None:
    file = table_source(tmp_path, "a.parquet")
    path = tmp_path / "a.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    (row,) = raws(file)
    assert isinstance(row, Unreadable)


def test_gzip_of_text_is_not_seekable_and_text_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"a"))
    assert not TextFile(path, formats.split_lines, "line").seekable
    assert TextFile(tmp_path / "a.txt", formats.split_lines, "line").seekable
