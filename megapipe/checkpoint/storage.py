"""Bytes on disk: reads that check what they open, checksums, room.

Reads use `pread` into a buffer of ours, not `mmap`: a file that shrinks or a disk that fails is
then an error with a name, where a mapped page would end the process with SIGBUS.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from megapipe.amounts import counted, format_bytes
from megapipe.errors import CheckpointError, explained

BLOCK_BYTES = 16 * 2**20
"""Unit of checksums. Reading a part of a chunk reads whole blocks: small enough that a slice costs
little more than itself, large enough that a checkpoint of 12 TB has under a million of them."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the user's quota, or the limit on the size of one file (`ulimit -f`)."""


def checksum(data: bytes | memoryview) -> str:
    """xxh3_128 in hex: it finds damage, not intent (it is no signature). 6.6 GB/s on one core."""
    return xxhash.xxh3_128_hexdigest(data)


def blocks(data: memoryview) -> Iterator[memoryview]:
    """The bytes of one chunk, block by block."""
    for begin in range(0, len(data), BLOCK_BYTES):
        yield data[begin : begin + BLOCK_BYTES]


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A descriptor of a regular file: symbolic links, pipes and devices are refused."""
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except OSError as error:
        reason = {errno.ENOENT: "is missing", errno.ELOOP: "is a symbolic link"}.get(
            error.errno or 0, f"can't be opened ({error.strerror})"
        )
        raise CheckpointError(f"{path} {reason}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def check_size(descriptor: int, path: Path, expected: int) -> None:
    size = os.fstat(descriptor).st_size
    if size != expected:
        raise CheckpointError(f"{path} has {counted(size, 'byte')}, its manifest says {expected}")


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from byte `offset` of the file."""
    while buffer:
        try:
            count = os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            raise CheckpointError(f"{path} can't be read ({error.strerror})") from error
        if count == 0:
            raise CheckpointError(
                f"{path} ends at byte {offset}, {counted(len(buffer), 'byte')} too early"
            )
        buffer, offset = buffer[count:], offset + count


def read_small(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes."""
    with open_regular(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(f"{path} has {size} bytes, more than the {limit} allowed here")
        data = bytearray(size)
        read_into(descriptor, memoryview(data), 0, path)
    return bytes(data)


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write to the file system of `directory`."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def require_space(needed: int, directory: Path) -> int:
    """The bytes free at `directory`. Raises CheckpointError where fewer than `needed` are."""
    free = free_bytes(directory)
    if free < needed:
        raise CheckpointError(
            f"no space left on device: needs {format_bytes(needed)}, {format_bytes(free)} free"
        )
    return free


@contextmanager
def space_explained(needed: int, directory: Path) -> Iterator[None]:
    """Say how much was needed and how much is free when a write finds no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise CheckpointError(
            f"{os.strerror(error.errno).lower()}: needs {format_bytes(needed)} in all, "
            f"{format_bytes(free_bytes(directory))} free when the write failed"
        ) from error


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Raise what the system refuses as a CheckpointError, so that it keeps that kind between ranks
    and a training can go on after a save that failed."""
    try:
        yield
    except OSError as error:
        told = explained(error)
        if told is None:
            raise
        raise CheckpointError(str(told)) from error


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it; nothing happens when it is gone already."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path)
