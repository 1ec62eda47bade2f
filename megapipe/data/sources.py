"""A source of the blend: its files in order, and what one row of it is."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import xxhash

from megapipe.amounts import counted
from megapipe.config import SourceConfig
from megapipe.data.contents import check_content
from megapipe.data.files import COMPRESSED, TABLES, Found, FoundFile, file_format, find_files
from megapipe.data.formats import (
    BLOCK_BYTES,
    NoRows,
    RowFile,
    TextFile,
    split_lines,
    split_paragraphs,
    split_segments,
    split_text_lines,
)
from megapipe.data.rows import BadRowError, BadRows, row_text
from megapipe.data.tables import HubShard, LocalTable
from megapipe.errors import DataError
from megapipe.files import shown

HUB = "hf://"
SEGMENTS_PER_STREAM = 4
MIN_SEGMENT_BYTES = 8 << 10
LOOKERS = 16
"""Threads that look into files at the start."""

Keeps = Callable[[int, int], bool]
"""Whether row (file, row number) belongs to the split that is read."""


@dataclass(frozen=True)
class Source:
    """Files in sorted order. `key` is its config key; `fingerprint`, for people to read in part,
    changes with the files. `found`: their sizes and other names; None on the hub."""

    key: str
    config: SourceConfig
    files: tuple[RowFile, ...]
    fingerprint: str
    total_bytes: int | None  # of text; estimated where it is compressed, None on the hub
    found: Found | None = None

    def text(self, file: int, raw: object) -> str | None:
        """The text of a row, "" for an empty one, None for a blank line. Raises BadRowError."""
        return row_text(self.files[file], raw, self.config.text_field)


def open_source(config: SourceConfig, key: str, streams: int) -> Source:
    """Finds the files of data.sources[i] (`key`) and how each is read; looks into each.

    Raises DataError for what can't be read: a path that matches nothing, an unknown format, a file
    that is not what its name says, a table without the column.
    """
    if config.path.startswith(HUB):
        return _hub_source(config, key)
    return open_found(find_files(config.path, f"{key}.path"), config, key, streams)


def open_found(found: Found, config: SourceConfig, key: str, streams: int) -> Source:
    """The source of these files, read as `config` says; raises as `open_source`."""
    unfolded = sum(
        file.size * 4 if file.path.suffix in COMPRESSED else file.size for file in found.files
    )
    # Few large text files are cut finer, so that every stream has something to read.
    share = unfolded // (streams * SEGMENTS_PER_STREAM)
    segment = min(BLOCK_BYTES, max(MIN_SEGMENT_BYTES, share))
    digest = xxhash.xxh3_64(f"{config.text_field} {config.documents} {segment}".encode())
    for path, size, _ in found.files:
        digest.update(f"\n{path.name} {size}".encode(errors="surrogateescape"))
    files = tuple(_row_files(found.files, partial(_row_file, config, key, segment)))
    fingerprint = f"{len(files)} file(s) of {found.size:,} bytes ({digest.hexdigest()})"
    return Source(key, config, files, fingerprint, unfolded, found)


def _row_files(
    files: Sequence[FoundFile], look: Callable[[FoundFile], RowFile]
) -> Iterator[RowFile]:
    """Looks into several files at a time, since a network disk may take long for each. Of several
    errors it raises that of the first file."""
    share = 1 + len(files) // (4 * LOOKERS)
    parts = [files[first : first + share] for first in range(0, len(files), share)]
    with ThreadPoolExecutor(LOOKERS) as pool:
        for part in pool.map(lambda part: list(map(look, part)), parts):
            yield from part


def _row_file(config: SourceConfig, key: str, segment: int, file: FoundFile) -> RowFile:
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
        table = LocalTable(path, form, config.text_field, size)
        table.check()
        return table
    if form == "jsonl":
        return TextFile(path, split_lines, "json", size)
    match config.documents:
        case "file":
            return TextFile(path, partial(split_segments, size=segment), "text", size)
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
    files = tuple(
        HubShard(
            f"{config.path} shard {index}",
            partial(dataset.shard, num_shards=shards, index=index),
            config.text_field,
        )
        for index in range(shards)
    )
    digest = xxhash.xxh3_64(f"{config.path} {config.text_field} {shards}".encode())
    return Source(key, config, files, f"{shards} shard(s) ({digest.hexdigest()})", None)


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


def check_source(
    source: Source, keeps: Keeps, *, streams: int, shuffle_block: int, max_bad_rows: int
) -> int:
    """Finds a first usable row, and how many rows make a block. Reads no more than it must.

    Small sources get smaller blocks, so that each stream has one in every pass: rows // streams
    instead of shuffle_block. Raises DataError for a source without a usable row.
    """
    enough = streams * shuffle_block
    if source.total_bytes is not None and source.total_bytes >= 2 * streams * BLOCK_BYTES:
        enough = 0  # blocks are closed by bytes too, so there are more than streams of them
    rows, left_out, without_rows, usable = 0, 0, 0, False
    bad: Counter[str] = Counter()
    example = ""
    judge = BadRows(max_bad_rows, say=lambda _: None)
    for index, file in enumerate(source.files):
        for number, (raw, _) in enumerate(file.rows(0, 0)):
            rows += 1
            left_out += not keeps(index, number)
            if not usable and keeps(index, number):
                try:
                    text = source.text(index, raw)
                    usable = bool(text)
                    if isinstance(raw, NoRows):
                        without_rows += 1
                    elif text == "":
                        bad["empty"] += 1
                except BadRowError as error:
                    bad[error.reason] += 1
                    example = example or f" ({file.name}, row {number + 1}: {error})"
                    judge.add(source.key, file.name, number + 1, error)
            if usable and rows >= enough:
                return shuffle_block
    if usable:
        return min(shuffle_block, max(1, rows // streams))
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
