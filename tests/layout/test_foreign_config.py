"""Keys of another stack's config: understood, passed over, or refused with key and value."""

from typing import Any

import pytest

from megapipe.errors import ConversionError
from megapipe.layout.foreign_config import MOST, ForeignConfig


def refusal(config: ForeignConfig) -> list[str]:
    """The lines of what `finish` says."""
    with pytest.raises(ConversionError) as caught:
        config.finish({})
    first, *lines = str(caught.value).split("\n  ")
    assert first == "these settings of its config can't be used:"
    return lines


def test_values_and_defaults() -> None:
    config = ForeignConfig({"n": 3, "x": 1, "word": "a", "null": None, "switch": False})
    assert config.take("n", int) == 3
    assert config.take("x", float) == 1.0
    assert type(config.take("x", float)) is float
    assert config.take("word", str) == "a"
    assert config.take("switch", bool, True) is False
    assert config.take("null", int, 7) == 7
    assert config.take("absent", int, 8) == 8
    assert config.finish({"ours": 1}) == {"ours": 1}


def test_sizes_that_may_be_null() -> None:
    config = ForeignConfig({"null": None, "n": 5})
    assert config.optional_count("null", 3) is None
    assert config.optional_count("absent", 3) == 3
    assert config.optional_count("n", 3) == 5
    config.finish({})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "is not a whole number from 1 to 2,147,483,647"),
        (-1, "is not a whole number from 1"),
        (MOST + 1, "is not a whole number from 1"),
        (True, "is not of type int"),
        ("3", "is not of type int"),
        (3.0, "is not of type int"),
        ([3], "is not of type int"),
    ],
    ids=str,
)
def test_sizes(value: Any, said: str) -> None:
    config = ForeignConfig({"n": value})
    assert config.count("n") == 1  # which fits
    (line,) = refusal(config)
    assert line.startswith("n = ")
    assert said in line


def test_the_least_and_the_most() -> None:
    config = ForeignConfig({"zero": 0, "most": MOST})
    assert (config.count("zero", least=0), config.count("most")) == (0, MOST)
    config.finish({})


@pytest.mark.parametrize(
    ("read", "value", "said"),
    [
        ("positive", 0, "x = 0.0 is not above 0"),
        ("positive", -2.5, "x = -2.5 is not above 0"),
        ("positive", float("inf"), "x = inf is not a finite number"),
        ("positive", float("nan"), "x = nan is not a finite number"),
        ("positive", 10**400, "x = inf is not a finite number"),
        ("positive", "1", 'x = "1" is not of type float'),
        ("positive", False, "x = false is not of type float"),
        ("rate", 1, "x = 1.0 is not from 0 to less than 1"),
        ("rate", -0.1, "x = -0.1 is not from 0 to less than 1"),
        ("rate", {}, "x = {} is not of type float"),
    ],
)
def test_numbers(read: str, value: Any, said: str) -> None:
    config = ForeignConfig({"x": value})
    assert getattr(config, read)("x") >= 0
    assert refusal(config) == [said]


def test_what_is_missing() -> None:
    config = ForeignConfig({"null": None})
    config.take("absent", str)
    config.count("null")
    assert refusal(config) == [
        "absent is missing, and there is no default for it",
        "null is missing, and there is no default for it",
    ]


def test_values_that_are_required() -> None:
    config = ForeignConfig({"a": 1, "b": 1.0, "c": None, "d": "x", "e": True})
    config.require("a", 1, 1)
    config.require("b", 1, 1)  # of another type
    config.require("c", "x", "x", "y")
    config.require("d", "y", "y", "z")
    config.require("e", 1, 1)
    config.require("absent", False, True)
    assert refusal(config) == [
        "b = 1.0 is not supported (supported: 1)",
        'd = "x" is not supported (supported: "y" or "z")',
        "e = true is not supported (supported: 1)",
        "absent = false is not supported (supported: true)",
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, None),
        (["a", "a"], None),
        (["a"], 'kinds = ["a"] is not a list of 2 entries'),
        ("aa", 'kinds = "aa" is not a list of 2 entries'),
        (["a", "b"], 'kinds = "b" is not supported (supported: "a")'),
    ],
    ids=str,
)
def test_lists_of_one_value(value: Any, said: str | None) -> None:
    config = ForeignConfig({"kinds": value})
    config.require_each("kinds", 2, "a")
    if said is None:
        config.finish({})
    else:
        assert refusal(config) == [said]


def test_keys_that_nobody_has_asked_for() -> None:
    config = ForeignConfig({"z": 1, "a": "x", "off": False, "null": None, "known": 5, "zero": 0})
    config.ignore(["known", "other"])
    assert refusal(config) == [
        'a = "x" is a key that is not known here',
        "z = 1 is a key that is not known here",
        "zero = 0 is a key that is not known here",
    ]


def test_tables_within() -> None:
    config = ForeignConfig({"rope": {"type": 1, "more": 2}, "empty": {}, "flat": 3})
    assert config.table("absent") is None
    assert config.table("empty") is None
    assert config.table("flat") is None
    table = config.table("rope")
    assert table is not None
    table.take("type", str)
    config.join(table)
    assert refusal(config) == [
        "flat = 3 is not a table of keys",
        "rope.type = 1 is not of type str",
        "rope.more = 2 is a key that is not known here",
    ]


def test_pairs() -> None:
    config = ForeignConfig({"pair": [1, 0], "three": [1, 2, 3], "words": ["a", "b"]})
    assert config.pair("pair") == (1, 0)
    assert config.pair("absent") is None
    assert config.pair("three") is None
    config.pair("words")
    assert len(refusal(config)) == 2


def test_messages_are_short_and_printable() -> None:
    hostile = {f"\x1b[2J{number}" + "k" * 1000: "\x1b[31m\n" * 1000 for number in range(100)}
    lines = refusal(ForeignConfig(hostile))
    assert len(lines) == 11
    assert lines[-1] == "and 90 more"
    assert all(line.isprintable() and len(line) < 250 for line in lines)
