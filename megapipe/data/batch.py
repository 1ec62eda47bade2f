"""A replica's part of one global batch, and the thread that makes such parts ahead of time."""

import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import xxhash

from megapipe.data.packing import Stretch, Tokens
from megapipe.data.taken import State

MASK = (1 << 64) - 1


class FileReading(NamedTuple):
    """Time spent on reading a file of a source for one batch."""

    seconds: float
    source: str
    file: str


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch, n = global_batch_size / D samples in order.

    `samples` are their numbers in the run. `hash` and `text_bytes` are computed with the batch, in
    the thread that makes it. `tokens` int32 [n, S + 1], `documents` int32 [n, S];
    `sources` int32 [n, S] has the number of each target's source in the config. `stretches` say of
    each sample where its tokens come from; `after` is the state of each stream that was read,
    behind this batch.
    """

    step: int
    samples: Sequence[int]
    tokens: Tokens
    documents: Tokens
    sources: Tokens
    stretches: list[list[Stretch]]
    after: dict[int, State]
    slowest: FileReading

    def __post_init__(self) -> None:
        _ = self.hash, self.text_bytes

    @cached_property
    def text_bytes(self) -> Counter[str]:
        """Bytes of text that went into the tokens, by source."""
        found: Counter[str] = Counter()
        for stretches in self.stretches:
            for stretch in stretches:
                found[stretch.origin.source] += stretch.text_bytes
        return found

    @cached_property
    def hash(self) -> int:
        """64 bits of all samples: the sum, modulo 2**64, of the XXH3 hash of each one's tokens
        (as little-endian int32), seeded by its number. Those of all ranks add up."""
        return (
            sum(
                xxhash.xxh3_64_intdigest(tokens.astype("<i4").tobytes(), sample & MASK)
                for sample, tokens in zip(self.samples, self.tokens, strict=True)
            )
            & MASK
        )


class BatchWorker:
    """A thread that makes batches up to `ahead` ahead of the one who takes them."""

    def __init__(self, batches: Iterable[Batch], ahead: int) -> None:
        self._made: queue.Queue[Batch | BaseException] = queue.Queue()
        self._room = threading.Semaphore(ahead)
        self._stop = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(iter(batches),), name="data", daemon=True
        )
        self._thread.start()

    def take(self) -> Batch:
        if self._error is None:
            item = self._made.get()
            if isinstance(item, Batch):
                self._room.release()
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        self._stop = True
        self._room.release()
        self._thread.join()

    def _run(self, batches: Iterator[Batch]) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stop:
                    return
                self._made.put(next(batches))
        except BaseException as error:  # raised again where the batch is taken
            self._made.put(error)
