"""Blocks: consecutive rows of a source, dealt to the streams and shuffled inside.

The rows of a pass (epoch) are those of the files in an order drawn per epoch. They are cut into
blocks of `block_rows` rows, or fewer where BLOCK_BYTES are reached or the pass ends. Blocks are
numbered on through the epochs and block n belongs to stream n % streams: every pass is dealt out
exactly once, and a source with fewer blocks than streams still feeds all of them. Between epochs
up to streams - 1 numbers are left out such that a pass takes a count coprime to `streams`; so a
stream meets other blocks in every pass, and all of them in the end.

Everything here is a function of (files, block_rows, streams, seed), never of who reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import numpy as np
import xxhash

from megapipe.data.formats import BLOCK_BYTES, Raw
from megapipe.data.sources import Source
from megapipe.errors import DataError

KEPT_BYTES = 64 << 20
"""Blocks read past on the way to another one are kept up to this size per source, else re-read."""

MAX_CURSORS = 4
"""Places of a source that are open at once."""


class Address(NamedTuple):
    """Where block `number` begins; enough to open it without reading what lies before.

    `first` is the number of the epoch's first block; `file` counts in the epoch's order; `row` and
    `offset` are the place in the file.
    """

    number: int
    epoch: int
    first: int
    file: int
    row: int
    offset: int


class Row(NamedTuple):
    """A raw row; `file` counts in sorted order, `number` from 0 in the file."""

    file: int
    number: int
    raw: object


@dataclass(frozen=True)
class Block:
    address: Address
    rows: list[Row]
    size: int


def permutation(count: int, *key: object) -> list[int]:
    """A permutation of range(count) drawn by `key`, the same with every version of every library.

    Sorts splitmix64 hashes (Steele et al. 2014) of the indices.
    """
    base = np.uint64(xxhash.xxh3_64_intdigest(repr(key).encode()))
    hashes = base + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order: list[int] = np.argsort(hashes ^ (hashes >> np.uint64(31)), kind="stable").tolist()
    return order


class Cursor:
    """Reads the blocks of a source one after the other, from one address on, without end.

    `address` is where the next block begins; there always is one.
    """

    def __init__(
        self, source: Source, address: Address, *, block_rows: int, streams: int, seed: int
    ) -> None:
        self.address = address
        self._source = source
        self._block_rows = block_rows
        self._streams = streams
        self._seed = seed
        self._order = self._epoch_order()
        self._rows: Iterator[Raw] | None = None
        self._next: Raw | None = None
        self._find_next()

    def read(self, *, keep: bool) -> Block:
        """The next block; without its rows unless `keep`."""
        address = start = self.address
        rows: list[Row] = []
        count = size = 0
        while self._next is not None and count < self._block_rows and size < BLOCK_BYTES:
            raw, offset = self._next
            size += len(raw) if isinstance(raw, bytes) else 0
            if keep:
                rows.append(Row(self._order[self.address.file], self.address.row, raw))
            count += 1
            self.address = self.address._replace(row=self.address.row + 1, offset=offset)
            self._next = next(self._rows, None) if self._rows else None
            if self._next is None:
                self._next_file()
        self.address = self.address._replace(number=start.number + 1)
        if self._next is None:
            self._find_next()
        return Block(address, rows, size)

    def close(self) -> None:
        self._rows = None

    def _find_next(self) -> None:
        """Goes to the next row there is, in this epoch or the next."""
        if self._rows is None:
            self._open()
        if self._next is None:
            self._next_file()
        if self._next is None:
            self._next_epoch()
        if self._next is None:
            raise DataError(f"{self._source.key}.path: no rows are left in any of its files.")

    def _open(self) -> None:
        file = self._source.files[self._order[self.address.file]]
        self._rows = file.rows(self.address.row, self.address.offset)
        self._next = next(self._rows, None)

    def _next_file(self) -> None:
        while self._next is None and self.address.file + 1 < len(self._order):
            self.address = self.address._replace(file=self.address.file + 1, row=0, offset=0)
            self._open()

    def _next_epoch(self) -> None:
        number, epoch, first, *_ = self.address
        while gcd(number - first, self._streams) > 1:
            number += 1
        self.address = Address(number, epoch + 1, number, 0, 0, 0)
        self._order = self._epoch_order()
        self._open()
        self._next_file()

    def _epoch_order(self) -> list[int]:
        files = len(self._source.files)
        return permutation(files, "files", self._seed, self._source.key, self.address.epoch)


class BlockReader:
    """Hands the blocks of one source to the streams that one reader hosts.

    All streams share one scan where they keep pace. A stream that lags finds its block among those
    kept, or gets it re-read from its address; memory is bounded by KEPT_BYTES.
    """

    def __init__(
        self, source: Source, *, block_rows: int, streams: int, hosted: frozenset[int], seed: int
    ) -> None:
        self.source = source
        self.block_rows = block_rows
        self.streams = streams
        self.seed = seed
        self._hosted = hosted
        self._kept: dict[int, Block] = {}
        self._kept_bytes = 0
        self._passed_over: dict[int, Address] = {}
        self._requested: dict[int, int] = {}
        self._cursors: list[Cursor] = []
        # Up to this many blocks are read and dropped to reach a later one, before a new cursor is
        # opened for it.
        self._patience = 0 if all(file.seekable for file in source.files) else streams

    def read(self, number: int, near: Address | None) -> Block | None:
        """Block `number`; None if the number is left out. `near` is a block known to be before.

        Each stream asks for its numbers in rising order.
        """
        assert near is None or near.number <= number, (near, number)
        self._requested[number % self.streams] = number
        block = self._kept.pop(number, None)
        if block is not None:
            self._kept_bytes -= block.size
            return block
        cursor = self._cursor(number, near)
        while cursor.address.number < number:
            self._read_past(cursor)
        return cursor.read(keep=True) if cursor.address.number == number else None

    def close(self) -> None:
        for cursor in self._cursors:
            cursor.close()
        self._cursors.clear()
        self._kept.clear()

    def _read_past(self, cursor: Cursor) -> None:
        number = cursor.address.number
        stream = number % self.streams
        wanted = stream in self._hosted and number > self._requested.get(stream, -1)
        wanted = wanted and number not in self._kept
        keep = wanted and self._kept_bytes < KEPT_BYTES
        block = cursor.read(keep=keep)
        if keep:
            self._kept[number] = block
            self._kept_bytes += block.size
        elif wanted:
            self._passed_over[number] = block.address

    def _cursor(self, number: int, near: Address | None) -> Cursor:
        """The open cursor that gets to `number` with the least reading, or a new one."""
        near = self._passed_over.pop(number, None) or near or Address(0, 0, 0, 0, 0, 0)
        before = [c for c in self._cursors if c.address.number <= number]
        best = max(before, key=lambda cursor: cursor.address.number, default=None)
        if best is not None and best.address.number >= near.number - self._patience:
            return best
        if len(self._cursors) >= MAX_CURSORS:
            furthest = max(self._cursors, key=lambda cursor: cursor.address.number)
            oldest = next(cursor for cursor in self._cursors if cursor is not furthest)
            oldest.close()
            self._cursors.remove(oldest)
        self._cursors.append(
            Cursor(
                self.source,
                near,
                block_rows=self.block_rows,
                streams=self.streams,
                seed=self.seed,
            )
        )
        return self._cursors[-1]
