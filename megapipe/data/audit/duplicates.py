"""Exact duplicates among any number of documents, found with little memory.

Each document leaves 18 bytes on the disk: the 128-bit hash of its text, and which source and side
it is of. They lie in PARTITIONS files by the first bits of the hash, so equal texts meet in one,
and one at a time is sorted in memory: a billion documents take 18 GB of disk and 1 GB of memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megapipe.errors import DataError
from megapipe.files import write_reason

PARTITIONS = 64
ENTRY = np.dtype([("high", ">u8"), ("low", ">u8"), ("tag", "<u2")])
HELD = 1 << 16
"""Entries that a writer holds before it writes them."""

Entries = NDArray[Any]


@dataclass(frozen=True)
class Duplicates:
    """Of one tag: `repeats` are documents whose text came before under the same tag, `elsewhere`
    those whose text also stands under another one that is trained on."""

    repeats: int = 0
    elsewhere: int = 0


class HashWriter:
    """Writes the hashes of one process; `name` tells its files from those of others."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._held = bytearray()

    def add(self, digest: bytes, tag: int) -> None:
        """A document's hash (16 bytes) and tag (below 65,536)."""
        self._held += digest
        self._held += tag.to_bytes(2, "little")
        if len(self._held) >= HELD * ENTRY.itemsize:
            self.flush()

    def flush(self) -> None:
        """Write what is held. Raises DataError where there is no room."""
        entries = np.frombuffer(bytes(self._held), ENTRY)
        partitions = (entries["high"] >> np.uint64(58)).astype(np.int64)
        try:
            for number in np.unique(partitions):
                with (self._folder / f"{number:02}-{self._name}").open("ab") as file:
                    file.write(entries[partitions == number].tobytes())
        except OSError as error:
            raise DataError(
                f"{self._folder}: hashes of texts can't be written there: {write_reason(error)} Or "
                "set TMPDIR to a directory with room for 18 bytes of each document."
            ) from error
        self._held.clear()


def find_duplicates(folder: Path, trained: Sequence[bool]) -> list[Duplicates]:
    """What the writers of `folder` have met under each tag; `trained` says of each whether it is
    trained on."""
    repeats, elsewhere = np.zeros(len(trained), np.int64), np.zeros(len(trained), np.int64)
    for entries in _partitions(folder):
        more, others = _count(entries, np.array(trained))
        repeats += more
        elsewhere += others
    return [Duplicates(int(one), int(other)) for one, other in zip(repeats, elsewhere, strict=True)]


def _partitions(folder: Path) -> Iterator[Entries]:
    for number in range(PARTITIONS):
        parts = [np.fromfile(path, ENTRY) for path in sorted(folder.glob(f"{number:02}-*"))]
        if parts:
            yield np.concatenate(parts)


def _count(entries: Entries, trained: NDArray[np.bool_]) -> tuple[Entries, Entries]:
    """Repeats and texts elsewhere by tag, of entries that have all that are equal to them."""
    entries = entries[np.lexsort((entries["tag"], entries["low"], entries["high"]))]
    high, low, tag = entries["high"], entries["low"], entries["tag"]
    same_text = np.concatenate(([False], (high[1:] == high[:-1]) & (low[1:] == low[:-1])))
    repeated = same_text & np.concatenate(([False], tag[1:] == tag[:-1]))
    text = np.cumsum(~same_text) - 1
    # Under how many tags that are trained on each text stands.
    holders = np.bincount(text, weights=trained[tag] & ~repeated).astype(np.int64)
    others = holders[text] > trained[tag]
    tags = len(trained)
    return np.bincount(tag[repeated], minlength=tags), np.bincount(tag[others], minlength=tags)
