"""Every row of a text belongs to exactly one of its units, wherever those are cut."""

import io
import itertools
import re
from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megapipe.data import splitters
from megapipe.data.splitters import (
    Extent,
    Raw,
    Splitter,
    Unreadable,
    incomplete_tail,
    split_lines,
    split_paragraphs,
    split_segments,
    split_text_lines,
)

SEGMENT = 16
SPLITTERS: dict[str, Splitter] = {
    "lines": split_lines,
    "text lines": split_text_lines,
    "paragraphs": split_paragraphs,
    "segments": partial(split_segments, size=SEGMENT),
}
LIMITS = {"MAX_LINE_BYTES": 40, "BLOCK_BYTES": 60, "LINE_SLACK": 8, "PASSED_OVER": 5}
"""Far below those of real texts, so that short ones meet them."""

FRAGMENTS = [
    *(b"a", b"two words", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b" \t\n", b"\r", b"\xff"),
    *("é".encode(), "漢".encode(), "🎉".encode(), "é漢🎉".encode() * 5, b"long line " * 9),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=24).map(b"".join)


def stream_of(text: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(text))  # type: ignore[arg-type]


def rows_of(split: Splitter, text: bytes, start: int = 0, end: int | None = None) -> list[Raw]:
    """The rows of the unit [start, end), by their addresses in the text."""
    length = (len(text) if end is None else end) - start
    stream = stream_of(text[start:])
    found = split(stream, Extent(start == 0, lambda: length))
    return [Raw(row.value, start + row.address) for row in found]


def rows_by_units(split: Splitter, text: bytes, cuts: Sequence[int]) -> list[Raw]:
    borders = sorted({0, *cuts, len(text)})
    units = itertools.pairwise(borders) if len(borders) > 1 else [(0, 0)]
    return [row for start, end in units for row in rows_of(split, text, start, end)]


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LIMITS.items():
        monkeypatch.setattr(splitters, name, value)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("name", SPLITTERS)
def test_every_row_belongs_to_one_unit_whatever_the_units(name: str) -> None:
    split = SPLITTERS[name]

    @settings(deadline=None, max_examples=150)
    @given(texts, st.data())
    def check(text: bytes, data: st.DataObject) -> None:
        steps = st.just(SEGMENT) if name == "segments" else st.integers(1, 50)
        cuts: Sequence[int] = range(0, len(text), data.draw(steps))
        if name != "segments" and data.draw(st.booleans()):
            cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
        assert rows_by_units(split, text, cuts) == rows_of(split, text)

    check()


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("name", SPLITTERS)
def test_a_unit_with_an_end_that_becomes_known_late_has_the_same_rows(name: str) -> None:
    """As in an archive, where nobody knows how much text the frames of a unit hold."""
    split = SPLITTERS[name]

    @settings(deadline=None, max_examples=60)
    @given(texts, st.integers(0, 8), st.integers(1, 40))
    def check(text: bytes, unit: int, ahead: int) -> None:
        start = unit * SEGMENT
        length = SEGMENT
        if start + length > len(text):
            return
        counted = Counting(text[start:], ahead)

        def boundary() -> int | None:
            return length if counted.given > length else None

        stream = io.BufferedReader(counted, ahead)
        late = [
            Raw(row.value, start + row.address)
            for row in split(stream, Extent(start == 0, boundary))
        ]
        assert late == rows_of(split, text, start, start + length)

    check()


class Counting(io.RawIOBase):
    """Bytes that are given a few at a time, and counted."""

    def __init__(self, text: bytes, most: int) -> None:
        super().__init__()
        self.given = 0
        self._text, self._most = text, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        part = self._text[self.given : self.given + min(self._most, len(buffer))]
        buffer[: len(part)] = part
        self.given += len(part)
        return len(part)


# --- What the rows are ---------------------------------------------------------------------------


@settings(deadline=None)
@given(texts)
def test_lines_are_those_between_line_ends(text: bytes) -> None:
    expected = re.findall(rb"[^\n]*\n|[^\n]+", text)
    for split in (split_lines, split_text_lines):
        rows = rows_of(split, text)
        assert [row.value for row in rows] == expected
        assert [row.address for row in rows] == list(
            itertools.accumulate(map(len, expected), initial=0)
        )[:-1]


@settings(deadline=None)
@given(texts)
def test_paragraphs_are_the_runs_of_lines_between_blank_ones(text: bytes) -> None:
    lines = re.findall(rb"[^\n]*\n|[^\n]+", text)
    runs = itertools.groupby(lines, key=lambda line: bool(line.strip()))
    expected = [b"".join(run) for filled, run in runs if filled]
    rows = rows_of(split_paragraphs, text)
    assert [row.value for row in rows] == expected
    assert all(text.startswith(row.value, row.address) for row in rows)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_limits")
@settings(deadline=None)
@given(st.text(alphabet="aé漢🎉\n\r", max_size=300))
def test_long_rows_are_cut_and_lose_nothing_and_no_character_is_cut(text: str) -> None:
    limits = {"text lines": 40, "segments": SEGMENT + LIMITS["LINE_SLACK"]}
    for name, limit in limits.items():
        rows = [row.value for row in rows_of(SPLITTERS[name], text.encode())]
        assert all(isinstance(row, bytes) and len(row) <= limit for row in rows)
        assert "".join(row.decode() for row in rows) == text  # type: ignore[attr-defined]
    paragraphs = [row.value for row in rows_of(split_paragraphs, text.encode())]
    assert all(isinstance(row, bytes) and len(row) < 60 + 60 for row in paragraphs)
    assert "".join("".join(row.decode() for row in paragraphs).split()) == "".join(text.split())  # type: ignore[attr-defined]


@pytest.mark.parametrize("slack", [8, 15, 16, 40, 100])
def test_segments_end_behind_their_borders(slack: int) -> None:
    """Each border moves to the next line end, if that is near; lines may be longer than both."""

    @settings(deadline=None, max_examples=60)
    @example(b"x" * 46 + b"\n\n")
    @given(texts.filter(bool))
    def check(text: bytes) -> None:
        borders = [0]
        for border in range(SEGMENT, len(text), SEGMENT):
            near = text[border : border + slack]
            end = near.find(b"\n") + 1 or (len(near) if len(near) < slack else 0)
            if not end:
                end = next((n for n in range(4) if near[n] & 0xC0 != 0x80), 0)
            borders.append(border + end)
        borders = sorted({*borders, len(text)})
        expected = [Raw(text[a:b], a) for a, b in itertools.pairwise(borders)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splitters, "LINE_SLACK", slack)
            segments = SPLITTERS["segments"]
            assert rows_of(segments, text) == expected
            assert rows_by_units(segments, text, range(0, len(text), SEGMENT)) == expected

    check()


def test_segments_end_at_line_ends_where_there_are_some() -> None:
    text = b"0123456789\n" * 10
    rows = [row.value for row in rows_of(SPLITTERS["segments"], text)]
    assert rows == [b"0123456789\n" * count for count in (2, 1, 2, 1, 2, 1, 1)]


@pytest.mark.usefixtures("small_limits")
def test_a_line_above_the_limit_is_a_bad_row_and_the_next_is_read() -> None:
    text = b"x" * 99 + b"\nshort\n"
    first, second = rows_of(split_lines, text)
    assert first == Raw(Unreadable("longer than 0 MiB", "100 bytes", text_bytes=100), 0)
    assert second == Raw(b"short\n", 100)


@pytest.mark.usefixtures("small_limits")
def test_a_unit_in_which_no_row_begins_is_left_at_once() -> None:
    """A long line is passed over only as far as it takes to see that."""
    text = b"x" * 10_000 + b"\nlast\n"
    for name in ("lines", "text lines", "paragraphs"):
        counted = Counting(text[100:], 5)
        stream = io.BufferedReader(counted, 5)
        assert list(SPLITTERS[name](stream, Extent(False, lambda: 50))) == []
        assert counted.given < 200


@given(st.text(max_size=9), st.integers(0, 3))
def test_the_tail_of_a_cut_character(text: str, cut: int) -> None:
    data = (text + "🎉").encode()
    assert incomplete_tail(data[: len(data) - cut]) == (4 - cut if cut else 0)
