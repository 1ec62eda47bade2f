"""Where frames begin is found as decompressing finds it; units of them lose nothing."""

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data import formats, frames
from megapipe.data.formats import DAMAGED, NoRows, TextFile
from megapipe.data.frames import frame_units
from megapipe.data.splitters import (
    Splitter,
    Unreadable,
    split_lines,
    split_paragraphs,
    split_text_lines,
)
from megapipe.data.units import Unit
from tests.data.test_compressed import available
from tests.data.test_splitters import texts

SKIPPABLE = struct.pack("<II", 0x184D2A53, 4) + b"abcd"
SPLITTERS: dict[str, Splitter] = {
    "lines": split_lines,
    "text lines": split_text_lines,
    "paragraphs": split_paragraphs,
}


def frame(text: bytes, *, kind: int = 0) -> bytes:
    """With a checksum, with the size of its content, with both or with neither."""
    if kind == 4:
        return SKIPPABLE
    options = {"write_checksum": bool(kind & 1), "write_content_size": bool(kind & 2)}
    return zstandard.ZstdCompressor(**options).compress(text)  # type: ignore[arg-type]


def starts(content: bytes) -> list[int]:
    """Where each frame begins, found by decompressing."""
    found, place = [], 0
    while place < len(content):
        found.append(place)
        if content[place : place + 4] == SKIPPABLE[:4]:
            place += len(SKIPPABLE)
            continue
        decoder = zstandard.ZstdDecompressor().decompressobj()
        decoder.decompress(content[place:])
        place = len(content) - len(decoder.unused_data)
    return found


def units(path: Path) -> list[Unit]:
    with path.open("rb") as file:
        return list(frame_units(file))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame is a unit, and each file large enough to be cut into them."""
    monkeypatch.setattr(frames, "FRAME_BYTES", 1)
    monkeypatch.setattr(formats, "SMALL_ARCHIVE", 0)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.binary(max_size=400), st.integers(0, 4)), min_size=1, max_size=8),
    st.integers(1, 3000),
)
def test_frames_are_found_where_decompressing_finds_them(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[bytes, int]], repeat: int
) -> None:
    content = b"".join(
        frame(text * (repeat if n == 0 else 1), kind=kind) for n, (text, kind) in enumerate(parts)
    )
    path = tmp_path_factory.mktemp("frames") / "a.zst"
    path.write_bytes(content)
    expected = starts(content)
    found = units(path)
    if len(expected) == 1:
        assert found == [Unit(0, len(content), 4 * len(content))]
        return
    assert [unit.start for unit in found] == expected
    assert [unit.end for unit in found] == [*expected[1:], len(content)]


@pytest.mark.parametrize("size", [0, 10, 1 << 17, (1 << 17) + 1, 1 << 20])
@pytest.mark.parametrize("unit", [b"\0", bytes(range(256))], ids=["alike", "different"])
def test_frames_of_many_blocks(tmp_path: Path, size: int, unit: bytes) -> None:
    """Of all kinds: raw, run-length and compressed."""
    import random

    text = (random.Random(1).randbytes(size) if len(unit) > 1 else unit * size) + b"end"
    path = tmp_path / "a.zst"
    path.write_bytes(frame(text) + frame(text, kind=3) + frame(b"last"))
    assert [unit.start for unit in units(path)] == starts(path.read_bytes())


def test_small_frames_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = frame(b"text")
    monkeypatch.setattr(frames, "FRAME_BYTES", 3 * len(one))
    path = tmp_path / "a.zst"
    path.write_bytes(one * 10)
    assert [unit.start // len(one) for unit in units(path)] == [0, 3, 6, 9]


def test_what_can_not_be_sought_is_read_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zst"
    one = frame(b"text")
    for content in (one, b"", b"no zstd", one[:5], one + one[:7], one + b"garbage"):
        path.write_bytes(content)
        with path.open("rb") as file:
            found = frame_units(file)
        second = len(content) > len(one)
        assert found.whole is not second
        assert found[len(found) - 1].end == len(content), "damage belongs to the last unit"
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", len(one) + 10)
    path.write_bytes(one + frame(bytes(range(256))) + one)
    with path.open("rb") as file:
        assert frame_units(file).whole


def rows_of(file: TextFile, unit: Unit | None = None) -> list[object]:
    return [row.value for row in file.rows(unit)]


def by_units(file: TextFile) -> list[list[object]]:
    return [rows_of(file, unit) for unit in file.units()]


def cut(text: bytes, places: Sequence[int]) -> list[bytes]:
    borders = sorted({0, *(place for place in places if place <= len(text)), len(text)})
    return [text[a:b] for a, b in zip(borders, [*borders[1:], len(text)], strict=True)]


@pytest.mark.parametrize("name", SPLITTERS)
def test_every_row_belongs_to_one_unit_wherever_frames_are_cut(tmp_path: Path, name: str) -> None:
    @settings(deadline=None, max_examples=60)
    @given(texts, st.lists(st.integers(0, 150), max_size=6), st.integers(1, 60))
    def check(text: bytes, places: list[int], joined: int) -> None:
        path = tmp_path / "a.txt.zst"
        path.write_bytes(
            b"".join(
                frame(part, kind=len(part) % 4) + frame(b"", kind=4) for part in cut(text, places)
            )
        )
        file = TextFile(path, SPLITTERS[name], "line")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frames, "FRAME_BYTES", joined)
            found = [row for rows in by_units(file) for row in rows]
        plain = TextFile(tmp_path / "a.txt", SPLITTERS[name], "line")
        plain.path.write_bytes(text)
        expected = rows_of(plain)
        assert rows_of(file) == expected
        assert [row for row in found if row != NoRows()] == [
            row for row in expected if row != NoRows()
        ]

    check()


LINES = [b"%d %d of the text\n" % (n, n * n * 7919) for n in range(1200)]
FRAMES = 6


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_damaged_frame_loses_no_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = b"".join(LINES)
    parts = cut(text, [len(text) * n // FRAMES for n in range(1, FRAMES)])[:FRAMES]
    content = bytearray(b"".join(frame(part, kind=3) for part in parts))
    file = TextFile(tmp_path_factory.mktemp("damage") / "a.txt.zst", split_lines, "line")
    file.path.write_bytes(content)
    whole, before = by_units(file), list(file.units())
    assert [row for rows in whole for row in rows] == LINES
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    file.path.write_bytes(content)
    found, now = by_units(file), list(file.units())
    if found == whole:
        return  # a bit that stands for nothing
    hit = next(n for n, unit in enumerate(now) if place < unit.end)
    last = found[hit][-1]
    assert isinstance(last, Unreadable)
    assert last.reason == DAMAGED
    assert last.file_bytes <= now[hit].end - now[hit].start
    for n in range(hit):
        *rows, border = found[n]
        assert rows == whole[n][:-1]
        assert isinstance(border, bytes)
        assert whole[n][-1].startswith(border), "it may reach into the damage"  # type: ignore[attr-defined]
    if len(now) == len(before):
        assert now == before
        assert found[hit + 1 :] == whole[hit + 1 :], "the others are read as before"
    else:
        assert now[:hit] == before[:hit]
        assert len(now) <= hit + 2, "behind it nobody knows where a frame begins"


@pytest.mark.parametrize("name", ["lines", "text lines"])
def test_all_text_that_can_be_had_is_given_or_counted(tmp_path: Path, name: str) -> None:
    """Also the rest of a row whose beginning is lost."""
    text = b"".join(LINES)
    parts = cut(text, [len(text) * n // FRAMES for n in range(1, FRAMES)])[:FRAMES]
    stored = [frame(part, kind=1) for part in parts]
    for number, place in ((2, 600), (4, 20)):
        content = stored[number]
        stored[number] = content[:place] + b"\xff" * 40 + content[place + 40 :]
    file = TextFile(tmp_path / "a.txt.zst", SPLITTERS[name], "line")
    file.path.write_bytes(b"".join(stored))
    units_now = list(file.units())
    rows = [row for rows in by_units(file) for row in rows]
    there = 0
    with file.path.open("rb") as opened:
        for unit in units_now:
            content = opened.read(unit.end - unit.start)
            there += len(available(".zst", content)[0])
    given = sum(len(row) for row in rows if isinstance(row, bytes))
    damage = [row for row in rows if isinstance(row, Unreadable)]
    assert len(damage) == 2
    assert any("the rest of a row behind it" in row.detail for row in damage)
    assert given + sum(row.text_bytes for row in damage) == there


def test_damage_between_frames_loses_the_frames_behind_it(tmp_path: Path) -> None:
    parts = cut(b"".join(LINES), [10_000, 20_000])[:3]
    stored = [frame(part, kind=1) for part in parts]
    file = TextFile(tmp_path / "a.txt.zst", split_lines, "line")
    file.path.write_bytes(stored[0] + b"garbage" + stored[1] + stored[2])
    first, second = by_units(file)
    assert first == by_units_of_plain(tmp_path, parts[0])
    (lost,) = second
    assert isinstance(lost, Unreadable)
    assert lost.file_bytes == len(b"garbage" + stored[1] + stored[2])


def by_units_of_plain(folder: Path, text: bytes) -> list[object]:
    plain = TextFile(folder / "plain.txt", split_lines, "line")
    plain.path.write_bytes(text)
    return rows_of(plain)
