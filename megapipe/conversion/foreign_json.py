"""JSON of files that are distrusted: it is parsed only where what comes of it is small."""

import json
from collections import Counter
from typing import Any, NoReturn

MAX_BYTES = 8 * 2**20
"""Of a file with JSON about a model, or the header of a file of tensors: 20 times what models with
hundreds of billions of parameters have."""
MAX_PARTS = 300_000
"""Entries of all lists and tables together, of which a large model's files have a tenth. What is
parsed takes a few hundred bytes for each, whatever the size of the file."""
MAX_DEPTH = 64


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8, whose tables have each key once.

    Raises ValueError with the reason, a phrase that fits after the file's name.
    """
    # Every entry begins after one of these. Those in strings count too, which real files bear.
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_PARTS:
        raise ValueError(f"is JSON with more than {MAX_PARTS:,} entries")
    try:
        text = content.decode()
        value = json.loads(text, object_pairs_hook=_table, parse_constant=_refuse_constant)
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except (ValueError, RecursionError):  # of UnicodeDecodeError and JSONDecodeError too
        raise ValueError("is not JSON") from None
    if _depth(value) > MAX_DEPTH:
        raise ValueError(f"is JSON that is nested more than {MAX_DEPTH} deep")
    return value


class _RefusedError(Exception):
    """JSON that another parser may read in another way."""


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise _RefusedError(f"is JSON with the key {twice[:60]!a} twice in one table")
    return table


def _refuse_constant(word: str) -> NoReturn:
    raise _RefusedError(f"is not JSON: {word} is no number")


def _depth(value: object) -> int:
    """How deep lists and tables are nested."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth
