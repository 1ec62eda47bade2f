"""From a raw row to a document's text, and the account of rows that can't be used."""

import json
from collections import Counter
from collections.abc import Callable

from megapipe.data.formats import RowFile, Unreadable
from megapipe.errors import DataError

SHOWN = 5
"""So many bad rows are reported one by one; then the count is, each time it has doubled."""


class BadRowError(Exception):
    """Why a row can't be used."""


def row_text(file: RowFile, raw: object, field: str) -> str | None:
    """The text of a row; None for a blank line, which is no row. Raises BadRowError."""
    if isinstance(raw, Unreadable):
        raise BadRowError(raw.reason)
    value = raw
    if isinstance(raw, bytes) and file.kind != "text":
        value = _decode(raw).rstrip("\r\n")
        if not value or value.isspace():
            return None
        if file.kind == "json":
            value = _json_field(value, field)
    if isinstance(value, bytes):
        value = _decode(value)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadRowError(f"the field {field!r} is {kind}, not text")
    if not value or value.isspace():
        raise BadRowError("empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError("not UTF-8 (half of a surrogate pair)") from None
    return value


def _json_field(text: str, field: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRowError("malformed JSON") from None
    if not isinstance(value, dict):
        raise BadRowError("not a JSON object")
    if field not in value:
        raise BadRowError(f"missing field {field!r}")
    return value[field]


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError:
        raise BadRowError("not UTF-8") from None


def too_many_bad_rows(skipped: int, limit: int) -> DataError | None:
    """The error to raise where all readers together have skipped more than the limit."""
    if skipped <= limit:
        return None
    return DataError(
        f"{skipped} bad rows were met, more than data.max_bad_rows = {limit} allows. Mend the "
        "files that the messages above name, or raise data.max_bad_rows."
    )


class BadRows:
    """Counts the rows that one reader has skipped, reports them, and stops above the limit."""

    def __init__(self, limit: int, say: Callable[[str], None]) -> None:
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self._say = say
        self._next_summary = 2 * SHOWN

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, key: str, file: str, row: int, reason: str) -> None:
        """Row numbers count from 1. Raises DataError above the limit."""
        self.counts[reason] += 1
        if self.total > self.limit:
            others = f" ({self.summary()})" if self.total > 1 else ""
            raise DataError(
                f"{file}, row {row}: {reason}. That is more than data.max_bad_rows = {self.limit} "
                f"allows{others}. Mend {key}.path, or raise data.max_bad_rows to skip such rows."
            )
        if self.total <= SHOWN:
            self._say(f"{file}, row {row}: skipped: {reason}")
        elif self.total == self._next_summary:
            self._next_summary *= 2
            self._say(
                f"{self.total} rows skipped so far: {self.summary()}; the newest is {file}, "
                f"row {row}; data.max_bad_rows = {self.limit}"
            )

    def restore(self, counts: Counter[str]) -> None:
        """Goes on from the counts of a checkpoint."""
        self.counts = counts
        while self._next_summary <= self.total:
            self._next_summary *= 2

    def summary(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
