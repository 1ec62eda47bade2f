"""Rows that a run must not read any more: someone's data that is deleted, duplicates, test sets.

Lists are kept beside the run as hashes only, so that what they name can be forgotten.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megapipe.config import ExcludeConfig, SourceConfig
from megapipe.data.files import file_format, find_files
from megapipe.data.formats import RowFile, TextFile
from megapipe.data.rows import json_field
from megapipe.data.splitters import Raw, split_lines
from megapipe.errors import DataError
from megapipe.files import replace_durably, shown

EVERY_SOURCE = ""
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Exclusions:
    """What is excluded: XXH3 hashes of 128 bits, sorted; `digest` names the list."""

    hashes: Hashes
    digest: str

    def __len__(self) -> int:
        return len(self.hashes)

    def has(self, source: str, by: str, value: str) -> bool:
        """Whether a row of the source with this id, or hash of its text, is excluded."""
        return any(self._holds(_hash(name, by, value)) for name in (EVERY_SOURCE, source))

    def _holds(self, key: int) -> bool:
        high, low = key >> 64, key & (1 << 64) - 1
        place = int(np.searchsorted(self.hashes[:, 0], np.uint64(high)))
        while place < len(self.hashes) and int(self.hashes[place, 0]) == high:
            if int(self.hashes[place, 1]) == low:
                return True
            place += 1
        return False


class History:
    """Which rows were excluded when: (step, exclusions) pairs, each from the batch behind its step
    on. No batch was made with those of a later start."""

    def __init__(self, entries: Sequence[tuple[int, Exclusions | None]]) -> None:
        self._entries = entries

    @classmethod
    def of(cls, exclusions: Exclusions | None) -> "History":
        """Of a run that begins with them."""
        return cls([(0, exclusions)])

    @classmethod
    def going_on(
        cls,
        state: Sequence[Any],
        now: Exclusions | None,
        step: int,
        find: Callable[[str], Exclusions],
    ) -> "History":
        """Of a run that goes on behind `step`, with other exclusions or the same. Those before are
        looked up by their digests."""
        known = {now.digest: now} if now else {}
        entries: list[tuple[int, Exclusions | None]] = [
            (begin, (known.get(digest) or find(digest)) if digest else None)
            for begin, digest, _ in state
            if begin < step or begin == 0
        ]
        _, last = entries[-1]
        if (last and last.digest) != (now and now.digest):
            entries.append((step, now))
        return cls(entries)

    @classmethod
    def recorded(cls, state: Sequence[Any], find: Callable[[str], Exclusions]) -> "History":
        """As `state` has it."""
        return cls([(begin, find(digest) if digest else None) for begin, digest, _ in state])

    def at(self, step: int) -> Exclusions | None:
        """Those of the batch behind a step."""
        return next((one for begin, one in reversed(self._entries) if begin <= step), None)

    @property
    def steps(self) -> set[int]:
        """Where they change."""
        return {begin for begin, _ in self._entries}

    def state(self) -> list[Any]:
        """JSON: the steps, digests and numbers of rows."""
        return [[begin, one and one.digest, len(one) if one else 0] for begin, one in self._entries]


def read_exclusions(configs: Sequence[ExcludeConfig]) -> Exclusions | None:
    """All lists of the config together; None where there are none.

    Raises DataError for a list that can't be read, or that has a row without a value.
    """
    if not configs:
        return None
    keys = {key for index, config in enumerate(configs) for key in _keys(config, index)}
    pairs = [(key >> 64, key & (1 << 64) - 1) for key in sorted(keys)]
    hashes = np.array(pairs, dtype=np.uint64).reshape(len(pairs), 2)
    return Exclusions(hashes, xxhash.xxh3_128(hashes.astype("<u8").tobytes()).hexdigest())


def _keys(config: ExcludeConfig, index: int) -> Iterator[int]:
    key, field = f"data.exclude[{index}]", config.field or config.by
    names = config.sources or (EVERY_SOURCE,)
    for found in find_files(config.path, f"{key}.path").files:
        for value in _values(found.path, found.size, field, key):
            if config.by == "sha256":
                value = value.lower()
                if len(value) != 64 or value.strip("0123456789abcdef"):
                    raise DataError(
                        f"{shown(found.path)}: {value!r} is no SHA-256 hash, which has 64 digits "
                        f'from 0 to f. Set {key}.by = "id" if the list holds ids.'
                    )
            yield from (_hash(name, config.by, value) for name in names)


def _values(path: Path, size: int, field: str, key: str) -> Iterator[str]:
    """The values of a list. Raises DataError for a row without one."""
    match file_format(path):
        case "parquet":
            rows = _parquet_values(path, field, key)
        case "jsonl":
            lines = TextFile(path, split_lines, "json", size).rows()
            rows = (json_field(raw.value, field) for raw in lines if raw.value not in (b"\n", b""))
        case _:
            raise DataError(
                f"{shown(path)}: a list of rows is .parquet or .jsonl, which its name does not "
                f"say; correct {key}.path."
            )
    for number, row in enumerate(rows):
        value = as_key(row)
        if value is None:
            raise DataError(
                f"{shown(path)}, row {number + 1:,}: has no {field!r} that could name a row. "
                f"Repair the list, or set {key}.field."
            )
        yield value


def _parquet_values(path: Path, field: str, key: str) -> Iterator[object]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise DataError(
                    f"{shown(path)}: there is no column {field!r}; set {key}.field to one of "
                    f"{', '.join(names)}."
                )
            for batch in table.iter_batches(columns=[field], use_threads=False):
                yield from batch.column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{shown(path)}: can't be read: {error}. Repair the list.") from error


def as_key(value: object) -> str | None:
    """An id as text: strings and whole numbers; None for what names nothing."""
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value)


def row_id(file: RowFile, raw: Raw, source: SourceConfig) -> str | None:
    """The id of a row, None where it has none."""
    if source.id_field is None:
        return None
    if file.kind == "json":
        return as_key(json_field(raw.value, source.id_field))
    return as_key(raw.id)


def is_excluded(
    exclusions: Exclusions, file: RowFile, raw: Raw, source: SourceConfig, text: str
) -> bool:
    """Whether a row with this text is excluded, by its id or by the hash of its text."""
    id_ = row_id(file, raw, source)
    if id_ is not None and exclusions.has(source.name, "id", id_):
        return True
    digest = hashlib.sha256(text.encode()).hexdigest()
    return exclusions.has(source.name, "sha256", digest)


def _hash(source: str, by: str, value: str) -> int:
    parts = "\0".join((source, by, value))
    return xxhash.xxh3_128_intdigest(parts.encode(errors="surrogateescape"))


# --- Beside the run ------------------------------------------------------------------------------


def keep(directory: Path, exclusions: Exclusions) -> None:
    """Write the hashes beside the run: `megapipe data trace` needs those of earlier starts."""
    path = directory / f"exclude-{exclusions.digest}.u64"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        replace_durably(path, [exclusions.hashes.astype("<u8").tobytes()])


def kept(directory: Path, digest: str) -> Exclusions:
    """What `keep` has written. Raises DataError where it is gone or damaged."""
    path = directory / f"exclude-{digest}.u64"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{shown(path)}: can't be read ({error.strerror}), and rows were excluded by it. "
            "Restore it from a copy of the run."
        ) from error
    if len(content) % 16 or xxhash.xxh3_128(content).hexdigest() != digest:
        raise DataError(f"{shown(path)}: is damaged; restore it from a copy of the run.")
    return Exclusions(np.frombuffer(content, dtype="<u8").reshape(-1, 2), digest)
