"""Walking over tensors of any size in bounded memory, several at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from megapipe.checkpoint.rectangle import Rectangle

Value = TypeVar("Value")

SLICE_VALUES = 2 * 2**20
MAX_THREADS = 4
"""Each holds a slice and its values in float64."""


def slices(shape: Sequence[int], most: int = SLICE_VALUES) -> Iterator[Rectangle]:
    """Rectangles of at most `most` values that tile a tensor, in the order of its memory."""
    whole = Rectangle.whole(shape)
    if whole.volume <= most:
        if whole.volume:
            yield whole
        return
    rows, row = shape[0], whole.volume // shape[0]
    step = max(1, most // row)
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        if row <= most:
            yield Rectangle((begin, *whole.start[1:]), (count, *shape[1:]))
            continue
        for part in slices(shape[1:], most):
            yield Rectangle((begin, *part.start), (1, *part.shape))


def in_threads(action: Callable[[str], Value], names: Sequence[str]) -> list[Value]:
    """The results for all names, in order; reading, hashing and arithmetic run side by side."""
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        pending = [pool.submit(action, name) for name in names]
        try:
            return [one.result() for one in pending]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
