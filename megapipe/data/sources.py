"""A source of the blend: its files in order, and what one row of it is."""

import glob
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from megapipe.config import SourceConfig
from megapipe.data.formats import (
    BLOCK_BYTES,
    RowFile,
    TableFile,
    TextFile,
    split_lines,
    split_paragraphs,
    split_segments,
)
from megapipe.data.rows import BadRowError, BadRows, row_text
from megapipe.errors import DataError

HUB = "hf://"
FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst")
SEGMENTS_PER_STREAM = 4
MIN_SEGMENT_BYTES = 8 << 10

Keeps = Callable[[int, int], bool]
"""Whether row (file, row number) belongs to the split that is read."""


@dataclass(frozen=True)
class Source:
    """Files in sorted order. `key` is its config key; `fingerprint`, for people to read in part,
    changes with the files."""

    key: str
    config: SourceConfig
    files: tuple[RowFile, ...]
    fingerprint: str
    total_bytes: int | None

    def text(self, file: int, raw: object) -> str | None:
        """The text of a row; None for a blank line. Raises BadRowError."""
        return row_text(self.files[file], raw, self.config.text_field)


def open_source(config: SourceConfig, key: str, streams: int) -> Source:
    """Finds the files of data.sources[i] (`key`) and how each is read.

    Raises DataError when the path matches nothing, names a directory or an unknown format.
    """
    if config.path.startswith(HUB):
        return _hub_source(config, key)
    paths = find_files(config.path, f"{key}.path")
    sizes = [path.stat().st_size for path in paths]
    unfolded = [
        size * 4 if path.suffix in COMPRESSED else size
        for path, size in zip(paths, sizes, strict=True)
    ]
    # Few large text files are cut finer, so that every stream has something to read.
    share = sum(unfolded) // (streams * SEGMENTS_PER_STREAM)
    segment = min(BLOCK_BYTES, max(MIN_SEGMENT_BYTES, share))
    digest = xxhash.xxh3_64(f"{config.text_field} {config.documents} {segment}".encode())
    for path, size in zip(paths, sizes, strict=True):
        digest.update(f"\n{path.name} {size}".encode())
    files = tuple(_row_file(path, config, key, segment) for path in paths)
    fingerprint = f"{len(paths)} file(s) of {sum(sizes):,} bytes ({digest.hexdigest()})"
    return Source(key, config, files, fingerprint, sum(unfolded))


def find_files(pattern: str, key: str) -> list[Path]:
    """The files that a path or glob names, sorted. Raises DataError, naming `key`, for none."""
    if Path(pattern).is_dir():
        raise DataError(
            f'{key} = "{pattern}" is a directory; name files in it, as in "{pattern}/**/*.txt".'
        )
    names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
    paths = sorted(path for path in map(Path, names) if path.is_file())
    if not paths:
        raise DataError(
            f'{key} = "{pattern}" matches no file (looked from {Path.cwd()}); '
            "correct the path or quote the glob."
        )
    return paths


def file_format(path: Path) -> str | None:
    """text, jsonl, parquet or arrow, by the file's name; None when it doesn't say."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    found = FORMATS.get(suffix.lower())
    tables = ("parquet", "arrow")
    return None if path.suffix in COMPRESSED and found in tables else found


def _row_file(path: Path, config: SourceConfig, key: str, segment: int) -> RowFile:
    form = file_format(path) if config.format == "auto" else config.format
    if form == "jsonl":
        return TextFile(path, split_lines, "json")
    if form == "text":
        match config.documents:
            case "file":
                return TextFile(path, partial(split_segments, size=segment), "text")
            case "line":
                return TextFile(path, split_lines, "line")
            case "blank-line":
                return TextFile(path, split_paragraphs, "line")
    if form in ("parquet", "arrow"):
        opener = _open_parquet if form == "parquet" else _open_arrow
        return TableFile(str(path), partial(opener, path, config.text_field), config.text_field)
    raise DataError(
        f'{key}.path: the format of {path} can\'t be told by its name; set {key}.format = "text", '
        '"jsonl", "parquet" or "arrow". (Tables carry their own compression: no .gz or .zst.)'
    )


def _open_parquet(path: Path, column: str) -> Any:
    """Streams one column; raises KeyError when there is no such column."""
    from datasets import load_dataset
    from pyarrow.parquet import read_schema

    if column not in read_schema(path).names:
        raise KeyError(column)
    return load_dataset(
        "parquet", data_files=[str(path)], split="train", streaming=True, columns=[column]
    )


def _open_arrow(path: Path, column: str) -> Any:
    from datasets import load_dataset

    return load_dataset("arrow", data_files=[str(path)], split="train", streaming=True)


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
        TableFile(
            f"{config.path} shard {index}",
            partial(dataset.shard, num_shards=shards, index=index),
            config.text_field,
        )
        for index in range(shards)
    )
    digest = xxhash.xxh3_64(f"{config.path} {config.text_field} {shards}".encode())
    return Source(key, config, files, f"{shards} shard(s) ({digest.hexdigest()})", None)


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
    rows, left_out, usable = 0, 0, False
    bad: Counter[str] = Counter()
    judge = BadRows(max_bad_rows, say=lambda _: None)
    for index, file in enumerate(source.files):
        for number, (raw, _) in enumerate(file.rows(0, 0)):
            rows += 1
            left_out += not keeps(index, number)
            if not usable and keeps(index, number):
                try:
                    usable = source.text(index, raw) is not None
                except BadRowError as error:
                    bad[str(error)] += 1
                    judge.add(source.key, file.name, number + 1, str(error))
            if usable and rows >= enough:
                return shuffle_block
    if usable:
        return min(shuffle_block, max(1, rows // streams))
    if rows and left_out == rows:
        raise DataError(
            f"data.validation_fraction leaves nothing of {source.key} on one side: all of its "
            f"{rows} rows (texts, for text files) are on the other. Change the fraction, or name "
            "data.validation_sources instead."
        )
    reasons = "; ".join(f"{count} {reason}" for reason, count in bad.most_common())
    raise DataError(
        f'{source.key}.path = "{source.config.path}" yields no usable row in {len(source.files)} '
        f"file(s) with {rows} row(s){': ' + reasons if reasons else ''}. "
        "Name files with text, or take the source out."
    )
