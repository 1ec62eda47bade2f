"""What some units of a file hold, counted as training counts it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash

from megapipe.data.audit.duplicates import HashWriter
from megapipe.data.exclusions import Exclusions
from megapipe.data.pieces import token_count, usable_text
from megapipe.data.rows import Account, BadRowError
from megapipe.data.sources import Keeps, Source, SourceFile
from megapipe.data.splitters import Raw, Unreadable
from megapipe.data.tokenizer import Tokenizer
from megapipe.data.units import Unit

PLACES = 100
"""Bad rows of each kind whose places are kept, the first ones in the order of files."""


class BadPlace(NamedTuple):
    """Where a bad row is: `order` (number of the file, unit, row) sorts places."""

    order: tuple[int, ...]
    file: str
    place: str
    detail: str


@dataclass
class Side:
    """Rows that are trained on, or those for validation. `lengths` counts documents by the number
    of bits of their tokens: n stands for 2**(n - 1) to 2**n - 1 tokens."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    account: Account = field(default_factory=Account)

    @property
    def rows(self) -> int:
        """Documents, and rows that are none; the rest of a damaged file counts as one."""
        account = self.account
        unused = account.skipped.total() + account.empty_rows + account.excluded_rows
        return self.documents + unused

    def add_document(self, size: int, tokens: int) -> None:
        self.documents += 1
        self.text_bytes += size
        self.tokens += tokens
        self.lengths[tokens.bit_length()] += 1

    def update(self, other: "Side") -> None:
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.tokens += other.tokens
        self.lengths.update(other.lengths)
        self.account.update(other.account)


@dataclass
class Tally:
    """Of a source, or of a part of it: its sides, and the first bad rows by reason."""

    sides: list[Side]
    places: dict[str, list[BadPlace]] = field(default_factory=dict)

    def add_place(self, reason: str, place: BadPlace) -> None:
        known = self.places.setdefault(reason, [])
        if len(known) < PLACES:
            known.append(place)

    def update(self, other: "Tally") -> None:
        for side, more in zip(self.sides, other.sides, strict=True):
            side.update(more)
        for reason, places in other.places.items():
            self.places[reason] = sorted([*self.places.get(reason, []), *places])[:PLACES]


@dataclass(frozen=True)
class RowCounter:
    """How a source's rows are counted: which belong to each side, what is excluded there, and the
    tag by which duplicates are told apart."""

    source: Source
    tokenizer: Tokenizer
    keeps: Sequence[Keeps]
    exclusions: Sequence[Exclusions | None]
    tags: Sequence[int]

    def count(
        self,
        file: SourceFile,
        number: int,
        units: Iterable[int],
        hashes: HashWriter,
        advance: Callable[[int], None],
    ) -> Tally:
        """Reads units of a file, the source's `number`-th. `advance` gets bytes of text as they are
        read, as many as the units are said to have."""
        assert file.rows is not None
        tally = Tally([Side() for _ in self.keeps])
        for index in units:
            unit = file.units[index]
            rows = _announced(file.rows.rows(unit), unit.size, advance)
            for row, raw in enumerate(rows):
                counted = self._count_row(tally, file, unit, raw, (number, index, row))
                if counted is not None:
                    hashes.add(*counted)
        return tally

    def _count_row(
        self, tally: Tally, file: SourceFile, unit: Unit, raw: Raw, order: tuple[int, ...]
    ) -> tuple[bytes, int] | None:
        """The hash of a document and its tag; None of a row that is none."""
        assert file.rows is not None
        damage = isinstance(raw.value, Unreadable)
        for which, side in enumerate(tally.sides):
            if damage and which:
                return None  # it belongs to both sides, and is one
            try:
                text = usable_text(
                    self.source,
                    file,
                    unit,
                    raw,
                    keeps=self.keeps[which],
                    exclusions=self.exclusions[which],
                    account=side.account,
                )
            except BadRowError as error:
                side.account.add_bad(raw.value, error.reason)
                where = file.rows.place(unit, raw.address)
                tally.add_place(error.reason, BadPlace(order, file.key, where, str(error)))
                return None
            if text is not None:
                data = text.encode()
                side.add_document(len(data), token_count(self.tokenizer, text))
                return xxhash.xxh3_128_digest(data), self.tags[which]
        return None


def _announced(rows: Iterable[Raw], size: int, advance: Callable[[int], None]) -> Iterator[Raw]:
    """The same rows. Announces `size` bytes in all, some of them before the end."""
    step, waiting, left = 1 << 20, 0, size
    for row in rows:
        yield row
        waiting += len(row.value) if isinstance(row.value, bytes) else 0
        if step <= waiting <= left:
            advance(waiting)
            waiting, left = 0, left - waiting
    advance(left)
