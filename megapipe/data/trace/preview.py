"""What a step of a config will see: read from the start, or from the newest position of its run."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from megapipe.config import Config
from megapipe.data.feed import BatchFeed
from megapipe.data.order.record import RECORD
from megapipe.data.packing import Tokens
from megapipe.data.positions import positions_in, read_position
from megapipe.data.tokenizer import Tokenizer
from megapipe.data.trace.replay import Bar, ReplayedStep, reading_back


@dataclass(frozen=True)
class Preview:
    """A step that was read, and whether the run has a position behind it already."""

    step: ReplayedStep
    feed: BatchFeed
    past: bool


def read_ahead(config: Config, tokenizer: Tokenizer, number: int, bar: Bar) -> Preview:
    """Step `number` as training would read it. Raises DataError where it can't be read, or where
    the run of the config has read other data so far."""
    record = Path(config.train.run_dir) / RECORD
    feed = reading_back(config, config.data, tokenizer, record)
    positions = positions_in(record)
    begin = max((at for at in positions if at < number), default=0)
    if begin in positions:
        feed.load_state_dict(read_position(positions[begin]))
    with bar(f"Reading on from step {begin}", number - begin) as advance:
        for _ in range(begin + 1, number):
            next(feed)
            advance(1)
        batch = next(feed)
    feed.close()
    past = any(at >= number for at in positions)
    return Preview(ReplayedStep(number, batch.samples[0], batch), feed, past)


def token_texts(tokenizer: Tokenizer, tokens: Tokens) -> Iterator[str]:
    """The text of each token. One that is a part of a character may show as a replacement for it,
    and its next one then has the character."""
    before = ""
    for count, token in enumerate(tokens.tolist(), 1):
        if token == tokenizer.end_of_document:
            yield "<end>"
            continue
        text = tokenizer.decode(tokens[:count].tolist())
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
        yield text[sum(1 for _ in same) :] or f"<{token}>"
        before = text


def document_ranges(documents: Tokens) -> list[tuple[int, int]]:
    """The first and last input of each document of a sample."""
    borders = np.flatnonzero(np.diff(documents)) + 1
    starts = [0, *borders.tolist()]
    return list(zip(starts, [start - 1 for start in [*starts[1:], len(documents)]], strict=True))
