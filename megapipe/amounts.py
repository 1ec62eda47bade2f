"""Amounts in words, as messages and reports give them. No torch."""

VOWELS = "aeiou"


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 rank`, `1,024 ranks`, `0 microbatches`."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """`ranks`, `microbatches`, `processes`, `entries`; of `more rank`, `more ranks`."""
    if noun.endswith(("s", "ch", "x")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def format_bytes(count: float) -> str:
    """Bytes, to a digit: `1 byte`, `812 bytes`, `4.2 GiB`."""
    if count < 1024:
        return counted(round(count), "byte")
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def scaled(number: float) -> str:
    """Three digits of a large number: `8.1 billion`, `411 thousand`, `812`."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f}"
