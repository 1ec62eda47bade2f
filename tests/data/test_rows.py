from collections import Counter
from pathlib import Path

import pytest

from megapipe.data.formats import TextFile, Unreadable, split_lines
from megapipe.data.rows import BadRowError, BadRows, row_text
from megapipe.errors import DataError

JSON = TextFile(Path("a.jsonl"), split_lines, "json")
LINE = TextFile(Path("a.txt"), split_lines, "line")
WHOLE = TextFile(Path("a.txt"), split_lines, "text")


@pytest.mark.parametrize(
    ("file", "raw", "text"),
    [
        (JSON, b'{"text": "a\\n"}\r\n', "a\n"),
        (JSON, b'\xef\xbb\xbf{"text": "a", "more": [1]}\n', "a"),
        (JSON, b"  \n", None),
        (LINE, b"a b \r\n", "a b "),
        (LINE, b"\n", None),
        (WHOLE, b"a\r\n\n", "a\r\n\n"),
        (WHOLE, "é".encode(), "é"),
    ],
)
def test_usable_rows(file: TextFile, raw: bytes, text: str | None) -> None:
    assert row_text(file, raw, "text") == text


@pytest.mark.parametrize(
    ("file", "raw", "reason"),
    [
        (JSON, b'{"text": "a', "malformed JSON"),
        (JSON, b"[" * 100_000, "malformed JSON"),
        (JSON, b'{"text": ' + b"1" * 5000 + b"}", "malformed JSON"),
        (JSON, b'["a"]', "not a JSON object"),
        (JSON, b'{"body": "a"}', "missing field 'text'"),
        (JSON, b'{"text": null}', "the field 'text' is null, not text"),
        (JSON, b'{"text": 5}', "the field 'text' is int, not text"),
        (JSON, b'{"text": ""}', "empty"),
        (JSON, b'{"text": " \\n"}', "empty"),
        (JSON, b'{"text": "\\ud800"}', "not UTF-8 (half of a surrogate pair)"),
        (JSON, b'{"text": "\xff"}', "not UTF-8"),
        (WHOLE, b"a\xff", "not UTF-8"),
        (WHOLE, b"\n \n", "empty"),
        (WHOLE, None, "the field 'text' is null, not text"),
        (WHOLE, 5, "the field 'text' is int, not text"),
        (WHOLE, Unreadable("empty file"), "empty file"),
    ],
)
def test_rows_that_can_not_be_used(file: TextFile, raw: object, reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        row_text(file, raw, "text")
    assert str(caught.value) == reason


def test_the_first_bad_rows_are_reported_one_by_one_then_in_doubling_steps() -> None:
    said: list[str] = []
    bad = BadRows(1000, said.append)
    for row in range(1, 101):
        bad.add("data.sources[0]", "a.jsonl", row, "empty" if row % 2 else "malformed JSON")
    assert said[0] == "a.jsonl, row 1: skipped: empty"
    assert len(said) == 5 + 4
    assert "80 rows skipped so far: 40 empty, 40 malformed JSON" in said[-1]
    assert bad.counts == Counter({"empty": 50, "malformed JSON": 50})


def test_one_row_above_the_limit_stops_and_names_key_file_row_and_limit() -> None:
    bad = BadRows(2, lambda _: None)
    bad.add("data.sources[1]", "a.jsonl", 4, "empty")
    bad.add("data.sources[1]", "a.jsonl", 7, "empty")
    with pytest.raises(DataError) as caught:
        bad.add("data.sources[1]", "b.jsonl", 9, "malformed JSON")
    message = str(caught.value)
    for part in ("b.jsonl, row 9: malformed JSON", "data.max_bad_rows = 2", "data.sources[1].path"):
        assert part in message


def test_counts_go_on_from_a_checkpoint() -> None:
    said: list[str] = []
    bad = BadRows(20, said.append)
    bad.restore(Counter({"empty": 20}))
    with pytest.raises(DataError):
        bad.add("data.sources[0]", "a.jsonl", 1, "empty")
    assert said == []
