"""Amounts in words: one of a thing is never `1 things`."""

import pytest

from megapipe.amounts import counted, format_bytes, plural, scaled


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "rank", "0 ranks"),
        (1, "rank", "1 rank"),
        (1024, "rank", "1,024 ranks"),
        (1, "more rank", "1 more rank"),
        (2, "microbatch", "2 microbatches"),
        (3, "process", "3 processes"),
        (2, "entry", "2 entries"),
        (1, "entry", "1 entry"),
    ],
)
def test_a_number_and_its_noun(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_plurals() -> None:
    nouns = ("key", "replica", "box", "directory")
    assert [plural(noun) for noun in nouns] == ["keys", "replicas", "boxes", "directories"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (4.25 * 2**30, "4.2 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_large_numbers() -> None:
    numbers = (812, 411_000, 1.5e6, 8.1e9, 2e13)
    words = ["812", "411 thousand", "1.5 million", "8.1 billion", "20 trillion"]
    assert [scaled(number) for number in numbers] == words
