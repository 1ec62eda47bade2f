"""From a raw row to a document's text, and the account of rows that can't be used."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megapipe.amounts import counted
from megapipe.data.formats import DAMAGED, NoRows, RowFile
from megapipe.data.splitters import Unreadable
from megapipe.errors import DataError

SHOWN = 5
"""The first bad rows, each of which is reported; then the count is, whenever it has doubled."""

NAMED = 8
"""Fields of a row that lacks the one with the text."""

MAX_NUL_SHARE = 0.01
"""Text hardly has NUL characters; UTF-16 read as UTF-8 has many, and so has binary data."""


class BadRowError(Exception):
    """Why a row can't be used. Rows are counted by `reason`, which is one of few."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass
class Account:
    """What a part of the data has not given to training, since the beginning of the run."""

    skipped: Counter[str] = field(default_factory=Counter)  # bad rows by reason
    skipped_bytes: int = 0  # of text, in bad rows
    unreadable_bytes: int = 0  # of damaged files, as they lie on the disk
    empty_rows: int = 0
    excluded_rows: int = 0  # times that one was passed over

    def add_bad(self, raw: object, reason: str) -> None:
        self.skipped[reason] += 1
        if isinstance(raw, Unreadable):
            self.skipped_bytes += raw.text_bytes
            self.unreadable_bytes += raw.file_bytes
        elif isinstance(raw, bytes):
            self.skipped_bytes += len(raw)

    def update(self, other: "Account") -> None:
        self.skipped.update(other.skipped)
        self.skipped_bytes += other.skipped_bytes
        self.unreadable_bytes += other.unreadable_bytes
        self.empty_rows += other.empty_rows
        self.excluded_rows += other.excluded_rows

    def subtract(self, other: "Account") -> None:
        """Undo `update`."""
        self.skipped.subtract(other.skipped)
        self.skipped_bytes -= other.skipped_bytes
        self.unreadable_bytes -= other.unreadable_bytes
        self.empty_rows -= other.empty_rows
        self.excluded_rows -= other.excluded_rows

    def state(self) -> dict[str, Any]:
        """JSON, from which Account(**state) is the same again."""
        return vars(self) | {"skipped": dict(self.skipped)}

    def __post_init__(self) -> None:
        self.skipped = Counter(self.skipped)


def row_text(file: RowFile, raw: object, field: str) -> str | None:
    """The text of a row; "" for an empty one, None for a blank line. Raises BadRowError.

    Blank lines stand between rows and are none; an empty row is one that holds no text.
    """
    if isinstance(raw, NoRows):
        return ""
    if isinstance(raw, Unreadable):
        raise BadRowError(raw.reason, raw.detail)
    value = raw
    if isinstance(raw, bytes) and file.kind != "text":
        value = _decode(raw).rstrip("\r\n")
        if not value or value.isspace():
            return None
        if file.kind == "json":
            _check_nuls(value)
            value = _json_field(value, field)
    if isinstance(value, bytes):
        value = _decode(value)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadRowError(f"the field {field!r} is {kind}, not text")
    if not value or value.isspace():
        return ""
    _check_nuls(value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError("not UTF-8 (half of a surrogate pair)") from None
    return value


def _check_nuls(text: str) -> None:
    count = text.count("\0")
    if count > MAX_NUL_SHARE * len(text):
        raise BadRowError(
            "NUL characters (binary data, or UTF-16)",
            f"{count:,} of {counted(len(text), 'character')}",
        )


def json_field(raw: object, field: str) -> object:
    """A field of a JSON line; None where the line has none or is no object."""
    try:
        value = json.loads(raw) if isinstance(raw, bytes) else None
    except (ValueError, RecursionError):
        return None
    return value.get(field) if isinstance(value, dict) else None


def _json_field(text: str, field: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRowError("malformed JSON") from None
    if not isinstance(value, dict):
        raise BadRowError("not a JSON object")
    if field not in value:
        raise BadRowError(f"missing field {field!r}", _names(list(value)))
    return value[field]


def _names(fields: list[str]) -> str:
    """Which fields a row has."""
    if not fields:
        return "the row is empty"
    names = [repr(name if len(name) <= 40 else f"{name[:37]}...") for name in fields[:NAMED]]
    more = f" and {len(fields) - NAMED} more" if len(fields) > NAMED else ""
    return f"the row has {', '.join(names)}{more}"


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
        f"{counted(skipped, 'bad row')} {'was' if skipped == 1 else 'were'} met, more than "
        f"data.max_bad_rows = {limit} allows. Repair the files that the messages above name, or "
        "raise data.max_bad_rows."
    )


class BadRows:
    """Counts the rows that one reader has skipped, reports them, and stops above the limit, if
    there is one."""

    def __init__(self, limit: int | None, say: Callable[[str], None]) -> None:
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self._say = say
        self._next_summary = 2 * SHOWN

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, key: str, file: str, place: str, error: BadRowError) -> None:
        """Row `place` of a file, as RowFile.place says it. Raises DataError above the limit. Damage
        of a file is always reported, since much text may be lost with that row."""
        reason = error.reason
        self.counts[reason] += 1
        if self.limit is not None and self.total > self.limit:
            others = f" ({self.summary()})" if self.total > 1 else ""
            raise DataError(
                f"{file}, {place}: {error}. That is more than data.max_bad_rows = {self.limit} "
                f"allows{others}. Repair {key}.path, or raise data.max_bad_rows to skip such rows."
            )
        if self.total <= SHOWN or reason == DAMAGED:
            self._say(f"{file}, {place}: skipped: {error}")
        elif self.total == self._next_summary:
            self._next_summary *= 2
            limit = "" if self.limit is None else f"; data.max_bad_rows = {self.limit}"
            self._say(
                f"{self.total} rows skipped so far: {self.summary()}; the newest is {file}, "
                f"{place}{limit}"
            )

    def restore(self, counts: Counter[str]) -> None:
        """Goes on from the counts of a checkpoint."""
        self.counts = counts
        while self._next_summary <= self.total:
            self._next_summary *= 2

    def summary(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
