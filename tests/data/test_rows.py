import json
from collections import Counter
from pathlib import Path

import pytest

from megapipe.data.formats import DAMAGED, NoRows, TextFile
from megapipe.data.rows import Account, BadRowError, BadRows, row_text
from megapipe.data.splitters import Unreadable, split_lines
from megapipe.errors import DataError

JSON = TextFile(Path("a.jsonl"), split_lines, "json")
LINE = TextFile(Path("a.txt"), split_lines, "line")
WHOLE = TextFile(Path("a.txt"), split_lines, "text")
NULS = "NUL characters (binary data, or UTF-16)"


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
        (WHOLE, b"\0\0" + b"x" * 198, "\0\0" + "x" * 198),  # 1 in 100: not more
        (WHOLE, b"\xef\xbb\xbfa\xef\xbb\xbfb", "a\ufeffb"),
        (JSON, b'{"text": ""}', ""),
        (JSON, b'{"text": " \\n"}', ""),
        (WHOLE, b"\n \n", ""),
        (WHOLE, NoRows(), ""),
    ],
)
def test_usable_rows(file: TextFile, raw: bytes, text: str | None) -> None:
    assert row_text(file, raw, "text") == text


MANY = json.dumps({f"{n}" * 50: n for n in range(10)}).encode()
MANY_NAMED = ", ".join(f"'{f'{n}' * 37}...'" for n in range(8))


@pytest.mark.parametrize(
    ("file", "raw", "reason"),
    [
        (JSON, b'{"text": "a', "malformed JSON"),
        (JSON, b"[" * 100_000, "malformed JSON"),
        (JSON, b'{"text": ' + b"1" * 5000 + b"}", "malformed JSON"),
        (JSON, b'["a"]', "not a JSON object"),
        (JSON, b'{"body": "a"}', "missing field 'text': the row has 'body'"),
        (JSON, b'{"a\\nb": 1, "c": 2}', "missing field 'text': the row has 'a\\nb', 'c'"),
        (JSON, b"{}", "missing field 'text': the row is empty"),
        (JSON, MANY, f"missing field 'text': the row has {MANY_NAMED} and 2 more"),
        (JSON, b'{"text": null}', "the field 'text' is null, not text"),
        (JSON, b'{"text": 5}', "the field 'text' is int, not text"),
        (JSON, b'{"text": "\\ud800"}', "not UTF-8 (half of a surrogate pair)"),
        (JSON, b'{"text": "\xff"}', "not UTF-8"),
        (WHOLE, b"a\xff", "not UTF-8"),
        (WHOLE, None, "the field 'text' is null, not text"),
        (WHOLE, 5, "the field 'text' is int, not text"),
        (WHOLE, Unreadable("damaged"), "damaged"),
        (WHOLE, Unreadable("damaged", "at byte 3"), "damaged: at byte 3"),
        (JSON, b'{\0"\0t\0e\0x\0t\0', f"{NULS}: 6 of 12 characters"),
        (LINE, b"a\0b\0\n\0", f"{NULS}: 3 of 6 characters"),
        (WHOLE, b"\0" * 3000, f"{NULS}: 3,000 of 3,000 characters"),
        (WHOLE, b"\0\0" + b"x" * 196, f"{NULS}: 2 of 198 characters"),
        (JSON, b'{"text": "\\u0000a"}', f"{NULS}: 1 of 2 characters"),
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
        reason = "not UTF-8" if row % 2 else "malformed JSON"
        bad.add("data.sources[0]", "a.jsonl", f"byte {row}", BadRowError(reason))
    assert said[0] == "a.jsonl, byte 1: skipped: not UTF-8"
    assert len(said) == 5 + 4
    assert "80 rows skipped so far: 40 not UTF-8, 40 malformed JSON" in said[-1]
    assert bad.counts == Counter({"not UTF-8": 50, "malformed JSON": 50})


def test_damage_of_a_file_is_reported_each_time() -> None:
    said: list[str] = []
    bad = BadRows(1000, said.append)
    for file in range(40):
        bad.add("data.sources[0]", f"{file}.gz", "byte 1", BadRowError(DAMAGED, f"at byte {file}"))
    assert len(said) == 40
    assert said[30] == f"30.gz, byte 1: skipped: {DAMAGED}: at byte 30"
    assert bad.counts == Counter({DAMAGED: 40})


def test_an_account_survives_json_and_adds_up() -> None:
    one = Account()
    one.add_bad(b"12345", "not UTF-8")
    one.add_bad(None, "null")
    one.add_bad(Unreadable(DAMAGED, text_bytes=2, file_bytes=70), DAMAGED)
    again = Account(**json.loads(json.dumps(one.state())))
    assert again == one
    again.update(one)
    assert again.skipped == Counter({"not UTF-8": 2, "null": 2, DAMAGED: 2})
    assert (again.skipped_bytes, again.unreadable_bytes, again.empty_rows) == (14, 140, 0)


def test_one_row_above_the_limit_stops_and_names_key_file_row_and_limit() -> None:
    bad = BadRows(2, lambda _: None)
    bad.add("data.sources[1]", "a.jsonl", "byte 4", BadRowError("not UTF-8"))
    bad.add("data.sources[1]", "a.jsonl", "byte 7", BadRowError("not UTF-8"))
    with pytest.raises(DataError) as caught:
        bad.add("data.sources[1]", "b.jsonl", "byte 9", BadRowError("malformed JSON"))
    message = str(caught.value)
    for part in (
        "b.jsonl, byte 9: malformed JSON",
        "data.max_bad_rows = 2",
        "data.sources[1].path",
    ):
        assert part in message


def test_counts_go_on_from_a_checkpoint() -> None:
    said: list[str] = []
    bad = BadRows(20, said.append)
    bad.restore(Counter({"not UTF-8": 20}))
    with pytest.raises(DataError):
        bad.add("data.sources[0]", "a.jsonl", "byte 1", BadRowError("not UTF-8"))
    assert said == []


def test_summaries_go_on_from_a_checkpoint() -> None:
    said: list[str] = []
    bad = BadRows(None, said.append)
    bad.restore(Counter({"not UTF-8": 20}))
    for row in range(20):
        bad.add("data.sources[0]", "a.jsonl", f"byte {row}", BadRowError("not UTF-8"))
    (line,) = said
    assert line.startswith("40 rows skipped so far: 40 not UTF-8")
