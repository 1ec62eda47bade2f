"""The directory in which something is written before it gets its name, and whose it is.

A lock of the kernel's on that directory says that a process is at work in it. The lock is gone when
the process is, however it ended. On file systems that can't lock a directory (NFS) every such
directory counts as left by a killed process.
"""

import fcntl
import os
import secrets
from pathlib import Path

from megapipe.checkpoint.storage import remove_tree


class Attempt:
    """One attempt to write a directory: makes a temporary one and holds its lock until `release`.

    In a group of ranks, only the first makes it.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def make(self, target: Path, mode: int = 0o777) -> Path:
        """Make and lock the directory beside `target` that will become it; returns its path."""
        while True:
            folder = target.parent / temporary_name(target.name)
            folder.mkdir(mode)
            try:
                descriptor = _open(folder)
            except FileNotFoundError:  # taken for a killed process's before it was locked
                continue
            if _lock(descriptor) and folder.is_dir():
                self._descriptor = descriptor
                return folder
            os.close(descriptor)

    def release(self) -> None:
        """Give up the lock, if there is one: the directory has its name by now, or is removed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def temporary_name(name: str) -> str:
    """Of the directory in which what will be `name` is written, beside it."""
    return f".tmp-{name}-{secrets.token_hex(4)}"


def remove_abandoned(folder: Path) -> bool:
    """Remove a temporary directory. False, and it stays, where a process is at work in it."""
    try:
        descriptor = _open(folder)
    except FileNotFoundError:
        return True
    try:
        if not _lock(descriptor):
            return False
        remove_tree(folder)
        return True
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _lock(descriptor: int) -> bool:
    """Lock a directory until it is closed. False where another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without such locks
        pass
    return True
