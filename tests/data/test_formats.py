import gzip
from functools import partial
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data import formats, splitters
from megapipe.data.formats import DAMAGED, NoRows, TextFile
from megapipe.data.splitters import (
    Raw,
    Splitter,
    Unreadable,
    split_lines,
    split_paragraphs,
    split_segments,
    split_text_lines,
)
from megapipe.data.units import UNIT_BYTES, EqualUnits, Unit
from megapipe.errors import DataError
from tests.data.samples import write
from tests.data.test_splitters import texts

TEXT = b"one\n\n \ntwo\r\nthree\n\n\nfour \xc3\xa9\nlast without end"
SEGMENTS = partial(split_segments, size=16)
SPLITTERS: dict[str, tuple[Splitter, list[bytes] | None]] = {
    "lines": (split_lines, TEXT.splitlines(keepends=True)),
    "paragraphs": (
        split_paragraphs,
        [b"one\n", b"two\r\nthree\n", b"four \xc3\xa9\nlast without end"],
    ),
    "segments": (SEGMENTS, None),
}


def values(file: TextFile, unit: Unit | None = None) -> list[object]:
    return [row.value for row in file.rows(unit)]


def by_units(file: TextFile) -> list[Raw]:
    return [row for unit in file.units() for row in file.rows(unit)]


@pytest.mark.parametrize("name", SPLITTERS)
def test_rows_are_the_same_in_every_compression(tmp_path: Path, name: str) -> None:
    split, expected = SPLITTERS[name]
    found = [
        list(TextFile(write(tmp_path / f"a.txt{suffix}", TEXT), split, "text").rows())
        for suffix in ("", ".gz", ".zst")
    ]
    assert found[0] == found[1] == found[2]
    assert expected is None or [row.value for row in found[0]] == expected
    for row in found[0]:
        assert TEXT.startswith(row.value, row.address)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lines", "paragraphs", "text lines", "segments"])
def test_every_row_of_a_file_belongs_to_one_unit(tmp_path: Path, name: str) -> None:
    """By its address in the file, which does not depend on the units."""
    split = (
        SEGMENTS if name == "segments" else getattr(splitters, f"split_{name.replace(' ', '_')}")
    )

    @settings(deadline=None, max_examples=60)
    @given(texts, st.integers(1, 60))
    def check(text: bytes, unit: int) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(text)
        file = TextFile(path, split, "text", len(text), 16 if name == "segments" else 0)
        whole = list(file.rows())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "UNIT_BYTES", unit)
            for limit in ("MAX_LINE_BYTES", "BLOCK_BYTES", "LINE_SLACK"):
                patch.setattr(splitters, limit, 40)
            whole = [row for row in file.rows() if row.value != NoRows()]
            assert [row for row in by_units(file) if row.value != NoRows()] == whole

    check()


def test_units_of_text_and_of_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"some text\n" * 100_000
    plain = TextFile(write(tmp_path / "a.txt", text), split_lines, "line").units()
    assert plain.state() == EqualUnits(len(text), UNIT_BYTES).state()
    segments = TextFile(tmp_path / "a.txt", SEGMENTS, "text", row_bytes=16).units()
    assert segments.state() == EqualUnits(len(text), 16).state()
    archives = [
        TextFile(write(tmp_path / f"a.jsonl{suffix}", text), split_lines, "json")
        for suffix in (".gz", ".zst")
    ]
    assert [file.units().whole for file in archives] == [False, False], "rows can be shuffled"
    monkeypatch.setattr(formats, "SMALL_ARCHIVE", 50)
    for file in archives:
        size = file.path.stat().st_size
        assert list(file.units()) == [Unit(0, size, 4 * size)]
        assert file.units().whole, "there is no place to start from"


def test_places_are_named_by_bytes(tmp_path: Path) -> None:
    plain = TextFile(tmp_path / "a.txt", split_lines, "line")
    packed = TextFile(tmp_path / "a.txt.zst", split_lines, "line")
    assert plain.place(Unit(4096, 8192, 4096), 5000) == "byte 5,000"
    assert packed.place(Unit(0, 100, 400), 5000) == "byte 5,000"
    assert packed.place(Unit(4096, 8192, 9), 50) == "byte 50 of the text behind byte 4,096"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_frames_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.txt{suffix}", b"one\n")
    path.write_bytes(path.read_bytes() * 3)
    assert values(TextFile(path, split_lines, "line")) == [b"one\n"] * 3


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
    file = TextFile(path, split_lines, "line")
    *before, last = list(file.rows())
    assert isinstance(last.value, Unreadable)
    assert last.value.reason == DAMAGED
    assert len(before) > 1000
    text = before[-1].value
    assert isinstance(text, bytes)
    assert last.address == before[-1].address + len(text), "where its text would go on"
    assert by_units(file) == [*before, last]


@pytest.mark.parametrize("split", [split_text_lines, split_paragraphs, SEGMENTS])
def test_a_character_cut_by_damage_is_dropped(tmp_path: Path, split: Splitter) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n\ntwo and more\n\nthree " + "漢".encode()[:2])[:-8])
    file = TextFile(path, split, "line")
    rows = list(file.rows())
    text, damage = (row.value for row in rows[-2:])
    assert isinstance(text, bytes)
    assert text.endswith(b"three ")
    assert isinstance(damage, Unreadable)
    assert damage.text_bytes == 2
    assert "a cut character before it (2 bytes) is dropped" in damage.detail
    assert by_units(file) == rows


def test_a_line_above_the_limit_is_a_bad_row_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitters, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", b"x" * (3 << 20) + b"\nshort\n")
    first, second = by_units(TextFile(path, split_lines, "json"))
    assert first.value == Unreadable("longer than 1 MiB", "3,145,729 bytes", text_bytes=3145729)
    assert second.value == b"short\n"


@pytest.mark.parametrize("split", [split_text_lines, split_paragraphs])
@pytest.mark.parametrize("before", ["", "a", "ab\n", "é\n"])
def test_long_lines_of_text_are_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, split: Splitter
) -> None:
    monkeypatch.setattr(splitters, "MAX_LINE_BYTES", 64)
    monkeypatch.setattr(splitters, "BLOCK_BYTES", 64)
    text = before + "漢é🎉a" * 100 + "\r" + "\u2028" * 100 + "\r\nlast"
    file = TextFile(write(tmp_path / "a.txt", text.encode()), split, "line")
    found = values(file)
    assert "".join(part.decode() for part in found if isinstance(part, bytes)) == text
    assert len(found) >= 1200 // 64


def test_a_file_without_text_has_one_row_that_says_so(tmp_path: Path) -> None:
    for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
        file = TextFile(write(tmp_path / name, b""), split_lines, "line")
        assert by_units(file) == [Raw(NoRows(), 0)]
    blank = TextFile(write(tmp_path / "b.txt", b"\n \n\n"), split_paragraphs, "line")
    assert by_units(blank) == [Raw(NoRows(), 0)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_file_of_another_size_than_at_the_start_stops_the_run(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"one\ntwo\n")
    size = path.stat().st_size
    file = TextFile(path, split_lines, "line", size)
    assert values(file) == [b"one\n", b"two\n"]
    rows = file.rows()
    next(rows)
    path.write_bytes(path.read_bytes()[:-3])  # while it is read
    with pytest.raises(DataError, match=rf"{name}: has {size - 3} bytes now and had {size} when"):
        list(rows)
    with pytest.raises(DataError, match="must not change while a run reads them"):
        values(file)
    with pytest.raises(DataError, match="must not change while a run reads them"):
        file.units()
    path.unlink()
    with pytest.raises(DataError, match="It was there when this run started: put it back"):
        values(file)


def test_a_file_that_vanished_stops_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: can't be read: No such file"):
        values(TextFile(tmp_path / "gone.txt", split_lines, "line"))
