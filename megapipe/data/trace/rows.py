"""What a step read, in words: the rows of each sample, and the text."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megapipe.data.packing import RowOrigin, Stretch, Tokens
from megapipe.data.source_stream import UNKNOWN
from megapipe.data.sources import Source
from megapipe.data.tokenizer import Tokenizer
from megapipe.data.trace.replay import ReplayedStep
from megapipe.data.units import EqualUnits, Unit, Units

CUT_SHORT = -1
"""The character of the end-of-document token where a document was cut short."""


@dataclass(frozen=True)
class RowUse:
    """Tokens [start, end) of a sample, and the row that they come from.

    `file` is its path and `place` where in it the row is. `part`: which part of the row's document
    they are; they begin with token `token` of the piece that begins at its character `character`.
    """

    start: int
    end: int
    source: str
    file: str
    place: str
    id: str | None
    epoch: int
    part: str
    character: int
    token: int
    text: str | None = None


@dataclass(frozen=True)
class SampleUse:
    """A sample: its place in the step's batch, from 1 on, and its number in the run."""

    place: int
    number: int
    rows: Sequence[RowUse]

    def table(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


class Describer:
    """Says of samples which rows they hold; with a `tokenizer` their texts too."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer | None = None) -> None:
        self._sources = {source.name: source for source in sources}
        self._files = {
            (source.name, file.key): file
            for source in sources
            for cohort in source.cohorts
            for file in cohort.files
        }
        self._tokenizer = tokenizer

    def samples(self, step: ReplayedStep) -> Iterator[SampleUse]:
        """The samples of a step."""
        batch = step.batch
        for number, tokens, stretches in zip(
            batch.samples, batch.tokens, batch.stretches, strict=True
        ):
            rows = [self.row(stretch, tokens) for stretch in stretches]
            yield SampleUse(number - step.first + 1, number, rows)

    def row(self, stretch: Stretch, tokens: Tokens) -> RowUse:
        """What one row gave to a sample with these tokens."""
        origin, end = stretch.origin, stretch.start + stretch.length
        text = None
        if self._tokenizer is not None:
            text = self._tokenizer.decode(tokens[stretch.start : end].tolist())
        return RowUse(
            stretch.start,
            end,
            origin.source,
            self.path(origin.source, origin.file),
            self.place(origin),
            origin.id,
            origin.epoch,
            _part(stretch),
            *stretch.within,
            text,
        )

    def path(self, source: str, key: str) -> str:
        """Where a file of a source is."""
        found = self._sources[source]
        return key if found.found is None else os.path.normpath(found.root / key)

    def place(self, origin: RowOrigin) -> str:
        """Where in its file a row is."""
        file = self._files[origin.source, origin.file]
        if origin.address == UNKNOWN or file.rows is None:
            return "a row that is gone"
        unit = file.units[unit_at(file.units, origin.unit)]
        return file.rows.place(unit, origin.address)


def unit_at(units: Units, start: int) -> int:
    """The number of the unit that holds what is at `start`."""
    if isinstance(units, EqualUnits):
        return min(start // units.step, len(units) - 1)
    return max(0, bisect_right(units, start, key=_start) - 1)


def _start(unit: Unit) -> int:
    return unit.start


def _part(stretch: Stretch) -> str:
    if stretch.within.character == CUT_SHORT:
        return "cut short"
    if stretch.begins:
        return "whole" if stretch.ends else "beginning"
    return "end" if stretch.ends else "middle"


def files_of(step: ReplayedStep) -> set[tuple[str, str]]:
    """The files that a step read: source and key."""
    return {
        (stretch.origin.source, stretch.origin.file)
        for stretches in step.batch.stretches
        for stretch in stretches
    }
