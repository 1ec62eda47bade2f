"""A source of the blend: its files, who joined when, and what one row of it is."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from megapipe.amounts import counted
from megapipe.config import ChangeConfig, SourceConfig
from megapipe.data.contents import check_content
from megapipe.data.files import (
    COMPRESSED,
    TABLES,
    Found,
    FoundFile,
    file_format,
    find_files,
    fingerprint,
    fixed_part,
    glob_matches,
)
from megapipe.data.formats import NoRows, RowFile, TextFile
from megapipe.data.rows import BadRowError, BadRows, row_text
from megapipe.data.splitters import (
    BLOCK_BYTES,
    Raw,
    split_lines,
    split_paragraphs,
    split_segments,
    split_text_lines,
)
from megapipe.data.tables import HubShard, LocalTable
from megapipe.data.units import Unit, Units, units_of
from megapipe.errors import DataError
from megapipe.files import shown

HUB = "hf://"
SEGMENTS_PER_STREAM = 4
MIN_SEGMENT_BYTES = 8 << 10
LOOKERS = 16
"""Threads that look into files at the start."""

Keeps = Callable[[str, int, int], bool]
"""Whether a row (key of its file, start of its unit, its address) is one of those that are read."""


Refuse = Callable[[DataError], None]
"""Takes the error of a file that can't be read."""


@dataclass(frozen=True)
class SourceFile:
    """A file as the order of the data knows it.

    `key` is its path from the fixed part of the source's pattern on; `mark` changes with its
    content; `row_bytes` is the size of its rows where they are large pieces of it, else 0; `rows`
    reads it, None where it has left the source.
    """

    key: str
    size: int
    mark: str
    units: Units
    row_bytes: int
    rows: RowFile | None

    def state(self) -> list[Any]:
        """JSON."""
        return [self.key, self.size, self.mark, self.units.state(), self.row_bytes]


Look = Callable[[str, FoundFile], SourceFile | None]


@dataclass(frozen=True)
class Cohort:
    """Files that joined a source together, behind step `after_step`, sorted by their keys."""

    after_step: int
    files: tuple[SourceFile, ...]

    @property
    def digest(self) -> str:
        """Changes with the names, sizes and contents of the files and how they are cut."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            digest.update(repr(file.state()).encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """`key` is its config key, for messages. `found`: the files on the disk and their other names;
    None on the hub."""

    key: str
    config: SourceConfig
    cohorts: tuple[Cohort, ...]
    total_bytes: int | None  # of text; estimated where it is compressed, None on the hub
    found: Found | None = None
    leaves: Mapping[str, int] = field(default_factory=dict)
    """The step behind which a file leaves the source, by its key."""

    @property
    def root(self) -> Path:
        """The directory that keys of files start from."""
        return fixed_part(self.config.path)

    @property
    def name(self) -> str:
        return self.config.name

    @cached_property
    def file_keys(self) -> list[str]:
        """The keys of all files, cohort by cohort: an order that all ranks have."""
        return [file.key for cohort in self.cohorts for file in cohort.files]

    @cached_property
    def file_numbers(self) -> dict[str, int]:
        """Where each key stands among `file_keys`."""
        return {key: number for number, key in enumerate(self.file_keys)}

    @property
    def files(self) -> list[RowFile]:
        """The files that can be read, cohort by cohort."""
        return [
            file.rows for cohort in self.cohorts for file in cohort.files if file.rows is not None
        ]

    def text(self, file: RowFile, raw: object) -> str | None:
        """The text of a row, "" for an empty one, None for a blank line. Raises BadRowError."""
        return row_text(file, raw, self.config.text_field)


class Change(NamedTuple):
    """Files that join and leave a source behind a step: patterns, of data.changes[`number`]."""

    number: int
    after_step: int
    add: str | None
    remove: str | None


def changes_of(configs: Sequence[ChangeConfig], source: str) -> list[Change]:
    """What data.changes declares for a source."""
    return [
        Change(index, config.after_step, config.add, config.remove)
        for index, config in enumerate(configs)
        if config.source == source
    ]


@dataclass(frozen=True)
class SourceRecord:
    """What an earlier start found of a source. Nothing about the order depends on it; it saves
    looking for units again, and knows files that have left and may be gone."""

    cohorts: tuple[Cohort, ...] = ()

    def file(self, key: str) -> SourceFile | None:
        return self._files.get(key)

    @cached_property
    def _files(self) -> dict[str, SourceFile]:
        return {file.key: file for cohort in self.cohorts for file in cohort.files}


NO_RECORD = SourceRecord()


def open_source(
    config: SourceConfig,
    key: str,
    streams: int,
    *,
    changes: Sequence[Change] = (),
    record: SourceRecord = NO_RECORD,
    refuse: Refuse | None = None,
) -> Source:
    """Finds the files of data.sources[i] (`key`) and how each is read; looks into each.

    Raises DataError for what can't be read: a path that matches nothing, an unknown format, a file
    that is not what its name says, a table without the column. With `refuse` a file of which that
    is so is left out, and the error goes there.
    """
    if config.path.startswith(HUB):
        return _hub_source(config, key)
    changes = sorted(changes, key=lambda change: change.after_step)
    joining = [change for change in changes if change.add is not None]
    later = [
        find_files(change.add or "", f"data.changes[{change.number}].add") for change in joining
    ]
    leaving = any(change.remove is not None for change in changes)
    first = find_files(config.path, f"{key}.path", may_be_gone=leaving)
    source = open_found(
        [_without(first, later), *later],
        config,
        key,
        streams,
        steps=[0, *(change.after_step for change in joining)],
        record=record,
        gone=[change.remove for change in changes if change.remove is not None],
        refuse=refuse,
    )
    return replace(source, leaves=dict(_leaves(source, changes)))


def _without(found: Found, others: Iterable[Found]) -> Found:
    """The files that no other has."""
    taken = {file.identity for other in others for file in other.files}
    files = tuple(file for file in found.files if file.identity not in taken)
    return Found(files, found.repeats)


def _leaves(source: Source, changes: Sequence[Change]) -> Iterator[tuple[str, int]]:
    """The step behind which each file leaves that does."""
    root = source.root
    for change in reversed(changes):
        if change.remove is None:
            continue
        keys = [
            file.key
            for cohort in source.cohorts
            for file in cohort.files
            if cohort.after_step <= change.after_step
            and glob_matches(change.remove, os.path.normpath(root / file.key))
        ]
        if not keys:
            raise DataError(
                f'data.changes[{change.number}].remove = "{shown(change.remove)}" matches no file '
                f'of the source "{source.name}"; name one as {source.key}.path does, or take the '
                "change out."
            )
        yield from ((key, change.after_step) for key in keys)


def open_found(
    found: Sequence[Found],
    config: SourceConfig,
    key: str,
    streams: int,
    *,
    steps: Sequence[int] = (0,),
    record: SourceRecord = NO_RECORD,
    gone: Sequence[str] = (),
    refuse: Refuse | None = None,
) -> Source:
    """The source of these files, cohort by cohort, read as `config` says; raises as `open_source`.

    Files on record that match a pattern of `gone` belong to it though they are not found.
    """
    root = fixed_part(config.path)
    here = [{os.path.relpath(file.path, root): file for file in part.files} for part in found]
    left = [_not_here(record, number, root, gone, here) for number in range(len(found))]
    sizes = {name: file.size for name, file in here[0].items()}
    sizes |= {file.key: file.size for file in left[0]}
    unfolded = sum(
        size * 4 if Path(name).suffix in COMPRESSED else size for name, size in sizes.items()
    )
    # Few large text files are cut finer, so that every stream has something to read.
    share = unfolded // (streams * SEGMENTS_PER_STREAM)
    row_bytes = min(BLOCK_BYTES, max(MIN_SEGMENT_BYTES, share))
    look: Look = partial(_source_file, config, key, row_bytes, record)
    if refuse is not None:
        look = partial(_look_or_refuse, look, refuse)
    cohorts = []
    for step, files, others in zip(steps, here, left, strict=True):
        looked_at = _in_parallel(look, list(files.items()))
        seen = [*(file for file in looked_at if file is not None), *others]
        cohorts.append(Cohort(step, tuple(sorted(seen, key=lambda file: file.key))))
    everything = Found(
        tuple(file for part in found for file in part.files),
        tuple(name for part in found for name in part.repeats),
    )
    return Source(key, config, tuple(cohorts), unfolded, everything)


def _not_here(
    record: SourceRecord,
    number: int,
    root: Path,
    gone: Sequence[str],
    here: Sequence[Mapping[str, FoundFile]],
) -> list[SourceFile]:
    """Files of a recorded cohort that were not found, and that a pattern of `gone` names."""
    if number >= len(record.cohorts):
        return []
    return [
        replace(file, rows=None)
        for file in record.cohorts[number].files
        if not any(file.key in files for files in here)
        and any(glob_matches(pattern, os.path.normpath(root / file.key)) for pattern in gone)
    ]


Named = tuple[str, FoundFile]


def _look_or_refuse(look: Look, refuse: Refuse, name: str, file: FoundFile) -> SourceFile | None:
    try:
        return look(name, file)
    except DataError as error:
        refuse(error)
        return None


def _in_parallel(look: Look, files: Sequence[Named]) -> Iterator[SourceFile | None]:
    """Looks into several files at a time, since a network disk may take long for each. Of several
    errors it raises that of the first file."""
    share = 1 + len(files) // (4 * LOOKERS)
    parts = [files[first : first + share] for first in range(0, len(files), share)]
    with ThreadPoolExecutor(LOOKERS) as pool:
        for part in pool.map(lambda part: [look(*named) for named in part], parts):
            yield from part


def _source_file(
    config: SourceConfig, key: str, row_bytes: int, record: SourceRecord, name: str, file: FoundFile
) -> SourceFile:
    rows = _row_file(config, key, row_bytes, file)
    mark = fingerprint(file.path, file.size)
    known = record.file(name)
    if (
        known is not None
        and (known.size, known.mark) == (file.size, mark)
        and known.row_bytes == rows.row_bytes
    ):
        return replace(known, rows=rows)
    return SourceFile(name, file.size, mark, rows.units(), rows.row_bytes, rows)


def recorded_file(state: Sequence[Any]) -> SourceFile:
    """The file of which `state` was taken, which nothing reads yet."""
    key, size, mark, units, row_bytes = state
    return SourceFile(key, size, mark, units_of(units), row_bytes, None)


def _row_file(config: SourceConfig, key: str, row_bytes: int, file: FoundFile) -> RowFile:
    """How a file is read, once its first bytes have been looked at."""
    path, size, _ = file
    form = file_format(path) if config.format == "auto" else config.format
    if form is None or (form in TABLES and path.suffix in COMPRESSED):
        raise DataError(
            f"{key}.path: the format of {shown(path)} can't be told by its name; set "
            f'{key}.format = "text", "jsonl", "parquet" or "arrow". (Tables carry their own '
            "compression: no .gz or .zst.)"
        )
    check_content(path, form, size)
    if form in TABLES:
        table = LocalTable(path, form, config.text_field, size, id_column=config.id_field)
        table.check()
        return table
    if form == "jsonl":
        return TextFile(path, split_lines, "json", size)
    match config.documents:
        case "file":
            split = partial(split_segments, size=row_bytes)
            return TextFile(path, split, "text", size, row_bytes)
        case "line":
            return TextFile(path, split_text_lines, "line", size)
        case "blank-line":
            return TextFile(path, split_paragraphs, "line", size)


def _hub_source(config: SourceConfig, key: str) -> Source:
    """hf://org/name, hf://org/name/config, each with :split; its shards are the files."""
    from datasets import load_dataset

    place, _, split = config.path.removeprefix(HUB).partition(":")
    parts = place.strip("/").split("/")
    if len(parts) not in (2, 3):
        raise DataError(f'{key}.path = "{config.path}" is not of the form hf://org/name[/config].')
    name, subset = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    try:
        dataset = load_dataset(name, subset, split=split or "train", streaming=True)
    except Exception as error:  # datasets raises what its many back ends raise
        raise DataError(
            f'{key}.path = "{config.path}" can\'t be opened: {error}. Check the name and split, '
            "and that the hub is reachable; or download it and name its files."
        ) from error
    names = dataset.column_names
    if names is not None and config.text_field not in names:
        raise DataError(
            f'{key}.text_field = "{config.text_field}" is not a column of {config.path}; '
            f"it has {', '.join(names)}."
        )
    shards = dataset.num_shards
    files = []
    for index in range(shards):
        shard = HubShard(
            f"{config.path} shard {index}",
            partial(dataset.shard, num_shards=shards, index=index),
            config.text_field,
        )
        mark = f"{index} of {shards}"
        files.append(SourceFile(f"{index:09}", 0, mark, shard.units(), 0, shard))
    return Source(key, config, (Cohort(0, tuple(files)),), None)


def repeated_files(
    sources: Sequence[Source], name: Callable[[Source], str] = lambda source: f"{source.key}.path"
) -> Iterator[str]:
    """Lines about files with several names, and about files that are in several sources.

    `name` is what people know a source by.
    """
    owners: dict[tuple[int, int], Source] = {}
    for source in sources:
        found = source.found
        if found is None:
            continue
        if found.repeats:
            names = counted(len(found.repeats), "further name")
            yield (
                f"{name(source)}: passed over {names} of files that are read already, such as "
                f"{shown(found.repeats[0])}."
            )
        shared = [file for file in found.files if file.identity in owners]
        if shared:
            other = owners[shared[0].identity]
            yield (
                f"{name(source)}: shares {counted(len(shared), 'file')} with {name(other)}, such "
                f"as {shown(shared[0].path)}. What both have is read for both."
            )
        owners.update(
            {file.identity: source for file in found.files if file.identity not in owners}
        )


def check_source(source: Source, keeps: Keeps, *, max_bad_rows: int) -> None:
    """Finds a first usable row. Raises DataError where there is none."""
    rows, left_out, without_rows = 0, 0, 0
    bad: Counter[str] = Counter()
    example = ""
    judge = BadRows(max_bad_rows, say=lambda _: None)
    for file, unit, raw in _all_rows(source):
        rows += 1
        assert file.rows is not None
        if not keeps(file.key, unit.start, raw.address):
            left_out += 1
            continue
        try:
            text = source.text(file.rows, raw.value)
        except BadRowError as error:
            bad[error.reason] += 1
            place = file.rows.place(unit, raw.address)
            example = example or f" ({file.rows.name}, {place}: {error})"
            judge.add(source.key, file.rows.name, place, error)
            continue
        if text:
            return
        if isinstance(raw.value, NoRows):
            without_rows += 1
        elif text == "":
            bad["empty"] += 1
    if rows and left_out == rows:
        raise DataError(
            f"data.validation_fraction leaves nothing of {source.key} on one side: the other has "
            f"all of it, {counted(rows, 'row')} (texts, for text files). Change the fraction, or "
            "name data.validation_sources instead."
        )
    reasons = [f"{count} {reason}" for reason, count in bad.most_common()]
    if without_rows:
        reasons.insert(0, f"{counted(without_rows, 'file')} without rows")
    why = f": {'; '.join(reasons)}{example}" if reasons else ""
    advice = "Name files with text, or take the source out."
    if any("field" in reason for reason in bad):
        advice = f"Set {source.key}.text_field to the field that holds text, or name other files."
    raise DataError(
        f'{source.key}.path = "{shown(source.config.path)}" yields no usable row in '
        f"{counted(len(source.files), 'file')} with {counted(rows - without_rows, 'row')}{why}. "
        f"{advice}"
    )


def _all_rows(source: Source) -> Iterator[tuple[SourceFile, Unit, Raw]]:
    """The rows of the files that the source begins with, in their order."""
    for file in source.cohorts[0].files:
        if file.rows is None:
            continue
        for unit in file.units:
            yield from ((file, unit, raw) for raw in file.rows.rows(unit))
