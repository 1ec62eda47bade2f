"""JSON of files that are distrusted."""

import pytest

from megapipe.conversion.foreign_json import MAX_PARTS, parse_json


def test_values() -> None:
    text = '{"a": [1, 2.5, null, true, "ü,[{"], "b": {"a": {}}}'
    assert parse_json(text.encode()) == {
        "a": [1, 2.5, None, True, "ü,[{"],
        "b": {"a": {}},
    }
    assert parse_json(b"[" + b"0," * (MAX_PARTS - 2) + b"0]")[:2] == [0, 0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b"\xff", "is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "is not JSON"),
        (b'{"a": 1} {"b": 2}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"9" * 5000, "is not JSON"),
        (b"[-Infinity]", "is not JSON: -Infinity is no number"),
        (b'{"a": {"\x7f\\u001b[2J": 1, "\x7f\\u001b[2J": 1}}', r"the key '\x7f\x1b[2J' twice"),
        (b"[" * 65 + b"]" * 65, "is JSON that is nested more than 64 deep"),
        (b"[" + b"0," * MAX_PARTS + b"0]", "is JSON with more than 300,000 entries"),
    ],
    ids=range(11),
)
def test_what_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(content)
    assert said in str(caught.value)
