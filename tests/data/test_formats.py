import gzip
import io
from functools import partial
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megapipe.data import formats
from megapipe.data.formats import DAMAGED, NoRows, RowFile, TextFile, Unreadable
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
    lines = b"".join(b"%d %d\n" % (n, n * n * 7919) for n in range(30_000))  # 4 blocks of zstd
    path = write(tmp_path / f"a.txt{suffix}", lines)
    if suffix == ".zst":  # with a checksum, as the zstd program writes it
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(lines))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    file = TextFile(path, formats.split_lines, "line")
    *before, last = list(file.rows(0, 0))
    assert isinstance(last[0], Unreadable)
    assert last[0].reason == DAMAGED
    assert len(before) > 1000
    for row in (1, len(before) // 2, len(before)):  # from any row on, the last one included
        assert list(file.rows(row, before[row - 1][1])) == [*before, last][row:]


@pytest.mark.parametrize("split", [formats.split_text_lines, formats.split_paragraphs, SEGMENTS])
def test_a_character_cut_by_damage_is_dropped_the_same_from_every_row_on(
    tmp_path: Path, split: formats.Splitter
) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n\ntwo and more\n\nthree " + "漢".encode()[:2])[:-8])
    file = TextFile(path, split, "line")
    rows = list(file.rows(0, 0))
    *_, (text, _), (damage, _) = rows
    assert isinstance(text, bytes)
    assert text.endswith(b"three ")
    assert isinstance(damage, Unreadable)
    assert damage.text_bytes == 2
    assert "a cut character before it (2 bytes) is dropped" in damage.detail
    for row, (_, offset) in enumerate(rows[:-1], start=1):
        assert list(file.rows(row, offset)) == rows[row:]


def test_a_line_above_the_limit_is_a_bad_row_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", b"x" * (3 << 20) + b"\nshort\n")
    first, second = raws(TextFile(path, formats.split_lines, "json"))
    assert first == Unreadable("longer than 1 MiB", "3,145,729 bytes", text_bytes=3145729)
    assert second == b"short\n"


@pytest.mark.parametrize("split", [formats.split_text_lines, formats.split_paragraphs])
@pytest.mark.parametrize("before", ["", "a", "ab\n", "é\n"])
def test_long_lines_of_text_are_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, split: formats.Splitter
) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 64)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 64)
    text = before + "漢é🎉a" * 100 + "\r" + "\u2028" * 100 + "\r\nlast"
    file = TextFile(write(tmp_path / "a.txt", text.encode()), split, "line")
    rows = list(file.rows(0, 0))
    parts = [raw for raw, _ in rows if isinstance(raw, bytes)]
    assert "".join(part.decode() for part in parts) == text
    assert len(rows) >= 1200 // 64
    for row, (_, offset) in enumerate(rows, start=1):
        assert list(file.rows(row, offset)) == rows[row:]


def test_a_file_without_text_has_one_row_that_says_so(tmp_path: Path) -> None:
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        file = TextFile(write(tmp_path / name, b""), formats.split_lines, "line")
        assert raws(file) == [NoRows()]
    blank = TextFile(write(tmp_path / "b.txt", b"\n \n\n"), formats.split_paragraphs, "line")
    assert raws(blank) == [NoRows()]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_file_of_another_size_than_at_the_start_stops_the_run(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"one\ntwo\n")
    size = path.stat().st_size
    file = TextFile(path, formats.split_lines, "line", size)
    assert raws(file) == [b"one\n", b"two\n"]
    rows = file.rows(0, 0)
    next(rows)
    path.write_bytes(path.read_bytes()[:-3])  # while it is read
    with pytest.raises(DataError, match=rf"{name}: has {size - 3} bytes now and had {size} when"):
        list(rows)
    with pytest.raises(DataError, match="must not change while a run reads them"):
        raws(file)
    path.unlink()
    with pytest.raises(DataError, match="It was there when this run started: put it back"):
        raws(file)


def test_a_file_that_vanished_stops_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: can't be read: No such file"):
        raws(TextFile(tmp_path / "gone.txt", formats.split_lines, "line"))


def test_gzip_of_text_is_not_seekable_and_text_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"a"))
    assert not TextFile(path, formats.split_lines, "line").seekable
    assert TextFile(tmp_path / "a.txt", formats.split_lines, "line").seekable
