"""Chance that is the same on every machine and with every version of every library.

All of it comes from XXH3 hashes of what a draw is about.
"""

import numpy as np
import xxhash

ORDER_VERSION = 2
"""Of the rule by which batches are made (docs/data-order.md). Checkpoints record it."""

ROUNDS = 8
MASK = (1 << 64) - 1


def keyed(*parts: object) -> int:
    """64 bits drawn by `parts`: XXH3 of their texts with NUL between them."""
    text = "\0".join(map(str, parts))
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogateescape"))


def permutation(count: int, key: int) -> list[int]:
    """A permutation of range(count): the order of the splitmix64 hashes (Steele et al. 2014) of
    key + 1 * gamma, key + 2 * gamma, ... It takes memory for all of them."""
    hashes = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order: list[int] = np.argsort(hashes ^ (hashes >> np.uint64(31)), kind="stable").tolist()
    return order


class Shuffle:
    """A permutation of range(count) that takes no memory, however large the count.

    A Feistel network of eight rounds over the next even number of bits; numbers that fall outside
    of the range go through it again until one falls inside (Black and Rogaway 2002).
    """

    def __init__(self, count: int, key: int) -> None:
        self._count = count
        self._key = key
        self._half = max(1, (max(count - 1, 0).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> int:
        """The number at a place."""
        if not 0 <= place < self._count:
            raise IndexError(place)
        number = place
        while True:
            number = self._forward(number)
            if number < self._count:
                return number

    def place_of(self, number: int) -> int:
        """The place at which a number stands."""
        if not 0 <= number < self._count:
            raise ValueError(number)
        place = number
        while True:
            place = self._backward(place)
            if place < self._count:
                return place

    def _forward(self, number: int) -> int:
        left, right = number >> self._half, number & self._low
        for turn in range(ROUNDS):
            left, right = right, left ^ self._drawn(turn, right)
        return left << self._half | right

    def _backward(self, number: int) -> int:
        left, right = number >> self._half, number & self._low
        for turn in reversed(range(ROUNDS)):
            left, right = right ^ self._drawn(turn, left), left
        return left << self._half | right

    def _drawn(self, turn: int, half: int) -> int:
        seed = (self._key + turn) & MASK
        return xxhash.xxh3_64_intdigest(half.to_bytes(8, "little"), seed) & self._low
