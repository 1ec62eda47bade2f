"""Reading a manifest, and proving that every byte is the one that was written. Needs no torch."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Event

from megapipe.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, decode
from megapipe.checkpoint.steps import MANIFEST_NAME, other_stack
from megapipe.checkpoint.storage import (
    BLOCK_BYTES,
    check_size,
    checksum,
    open_regular,
    read_into,
    read_small,
)
from megapipe.errors import CheckpointError
from megapipe.files import shown

MAX_THREADS = 8


@dataclass(frozen=True)
class ByteRange:
    """A range of bytes under one checksum."""

    file: str
    offset: int
    bytes: int
    checksum: str
    holds: str
    """What the bytes are, for the message."""


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed checkpoint. Raises CheckpointError naming the file."""
    path = directory / MANIFEST_NAME
    if not path.exists() and not path.is_symlink():
        hint = f"it holds no {MANIFEST_NAME} and no checkpoints"
        if directory.is_symlink() and not directory.exists():
            hint = f"it is a symbolic link to {shown(directory.readlink())}, which is not there"
        elif not directory.exists():
            hint = "it is not there"
        elif (directory / "checkpoints").is_dir():
            hint = "it is a run directory in which nothing was saved yet"
        elif not directory.is_dir():
            hint = "it is a file"
        elif stack := other_stack(directory):
            place = shown(directory)
            raise CheckpointError(
                f"{place} is not a checkpoint, but a model of {stack}: `megapipe convert {place} "
                "DIR` makes one of it."
            )
        raise CheckpointError(
            f"{shown(directory)} is not a checkpoint: {hint}. Name a run directory "
            "(train.run_dir), or a checkpoint such as RUN_DIR/checkpoints/step-00000100."
        )
    data = read_small(path, MAX_MANIFEST_BYTES)
    try:
        return decode(data)
    except CheckpointError as error:
        raise CheckpointError(f"{shown(path)} is damaged: {error}") from error


def byte_ranges(manifest: Manifest) -> Iterator[ByteRange]:
    """Every byte of every file but the manifest, each exactly once."""
    for name, extra in manifest.files.items():
        yield ByteRange(name, 0, extra.bytes, extra.checksum, "the file")
    for name, shard in manifest.shards.items():
        yield ByteRange(
            name, 0, shard.header_bytes, shard.header_checksum, "the safetensors header"
        )
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            for number, expected in enumerate(chunk.checksums):
                begin = number * BLOCK_BYTES
                size = min(BLOCK_BYTES, chunk.bytes - begin)
                yield ByteRange(chunk.file, chunk.offset + begin, size, expected, f"tensor {name}")


def damage_in_threads(
    directory: Path, manifest: Manifest, progress: Callable[[int], None] | None = None
) -> list[str]:
    """As `damage`, with the reading shared by threads: reads and checksums run side by side."""
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    stopped = Event()

    def went_on(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError("another thread has failed, or the user has interrupted")
        if progress is not None:
            progress(count)

    def share(part: int) -> list[str]:
        return damage(directory, manifest, part=part, parts=threads, progress=went_on)

    with ThreadPoolExecutor(threads) as pool:
        try:
            found = list(pool.map(share, range(threads)))
        except BaseException:
            stopped.set()  # or the threads would read to the end
            raise
    return list(dict.fromkeys(problem for part in found for problem in part))


def damage(
    directory: Path,
    manifest: Manifest,
    *,
    part: int = 0,
    parts: int = 1,
    read: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """What is wrong with the files of a checkpoint, one sentence each; empty when it is whole.

    Files must have their exact sizes and, unless `read` is False, every byte its checksum. With
    `parts` > 1 this looks at its share only: of `parts` equal shares, number `part`. `progress` is
    called with the number of bytes after each read of that many.
    """
    sizes = {name: file.bytes for name, file in (manifest.files | manifest.shards).items()}
    by_place = sorted(byte_ranges(manifest), key=lambda span: (span.file, span.offset))
    share = by_place[len(by_place) * part // parts : len(by_place) * (part + 1) // parts]
    buffer = memoryview(bytearray(max((span.bytes for span in share), default=0) if read else 0))
    problems = []
    for name, in_file in groupby(share, key=lambda span: span.file):
        path = directory / name
        try:
            with open_regular(path) as descriptor:
                check_size(descriptor, path, sizes[name])
                for span in in_file if read else ():
                    view = buffer[: span.bytes]
                    read_into(descriptor, view, span.offset, path)
                    if checksum(view) != span.checksum:
                        problems.append(describe(path, span))
                    if progress is not None:
                        progress(span.bytes)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def describe(path: Path, span: ByteRange) -> str:
    return (
        f"{path} is damaged: bytes {span.offset} to {span.offset + span.bytes} ({span.holds}) "
        "are not the ones that were written"
    )
