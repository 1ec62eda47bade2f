"""Where the frames of a .zst file begin, found without decompressing them.

Each frame says how long its blocks are (RFC 8878, 3.1.1), so that a look at the three bytes in
front of each block leads to the next frame.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO

from megapipe.data.units import FRAME_BYTES, MAX_FRAME_BYTES, ListedUnits, Unit

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE = b"\x2a\x4d\x18"
UNFOLDS = 4
"""Times that compressed text unfolds, roughly."""

DICTIONARY_ID = (0, 1, 2, 4)
CONTENT_SIZE = (0, 2, 4, 8)
RLE, RESERVED = 1, 3


def frame_units(file: BinaryIO) -> ListedUnits:
    """Runs of frames of at least FRAME_BYTES each. One unit, to be read from its beginning, where
    there is one frame or a very large one. What is damaged belongs to the last unit."""
    size = os.fstat(file.fileno()).st_size
    starts = [0]
    largest, last = 0, 0
    for start in _frame_starts(file, size):
        largest, last = max(largest, start - last), start
        if start - starts[-1] >= FRAME_BYTES:
            starts.append(start)
    if len(starts) == 1 or max(largest, size - last) > MAX_FRAME_BYTES:
        return ListedUnits([Unit(0, size, size * UNFOLDS)], whole=True)
    ends = [*starts[1:], size]
    return ListedUnits(
        [Unit(start, end, (end - start) * UNFOLDS) for start, end in zip(starts, ends, strict=True)]
    )


def _frame_starts(file: BinaryIO, size: int) -> Iterator[int]:
    """Where each frame but the first begins, up to the first that is damaged."""
    file.seek(0)
    while True:
        end = _frame_end(file)
        if end is None or end >= size:
            return
        yield end
        file.seek(end)


def _frame_end(file: BinaryIO) -> int | None:
    """Where the frame at the file's position ends; None where that can't be known."""
    magic = file.read(4)
    if len(magic) == 4 and magic[1:] == SKIPPABLE and 0x50 <= magic[0] < 0x60:
        skipped = file.read(4)
        return file.tell() + int.from_bytes(skipped, "little") if len(skipped) == 4 else None
    descriptor = int.from_bytes(file.read(1), "little")
    if magic != MAGIC:
        return None
    single_segment, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    content_size = CONTENT_SIZE[descriptor >> 6] or single_segment
    window = 1 - single_segment
    file.seek(window + DICTIONARY_ID[descriptor & 3] + content_size, os.SEEK_CUR)
    while True:
        header = file.read(3)
        if len(header) < 3:
            return None
        fields = int.from_bytes(header, "little")
        last, kind, length = fields & 1, fields >> 1 & 3, fields >> 3
        if kind == RESERVED:
            return None
        file.seek(1 if kind == RLE else length, os.SEEK_CUR)
        if last:
            return file.tell() + 4 * checksum
