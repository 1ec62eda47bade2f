"""What is wrong between keys that are right by themselves, and the words for saying so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """`key` is the dotted path of what to change first; `text` is a sentence, the fix included."""

    key: str
    text: str


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def choices(numbers: Sequence[int], most: int = 8) -> str:
    """`1, 2 or 4`, and `1, 2, ...` where there are more than `most`."""
    shown = [str(number) for number in numbers[:most]]
    if len(numbers) > most:
        return ", ".join(shown) + ", ..."
    return " or ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
