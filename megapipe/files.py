"""Files that are whole or not there, after a crash of the machine too."""

import errno
import os
import secrets
import select
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megapipe.errors import RAISE_OPEN_FILES, TOO_MANY_OPEN


def shown(text: str | os.PathLike[str]) -> str:
    """A path or other text of a user's for messages: on one line, and printable where its bytes
    aren't UTF-8."""
    return "".join(map(_printable, os.fspath(text)))


def reason(error: OSError) -> str:
    """Why a file can't be read, in a sentence, and what to do where that is known."""
    text = f"{error.strerror or error}."
    if isinstance(error, PermissionError):
        text += " Give this user the right to read it and to enter the directories above it."
    if error.errno in TOO_MANY_OPEN:
        text += f" {RAISE_OPEN_FILES}"
    return text


def write_reason(error: OSError) -> str:
    """Why a file can't be written, in a sentence, and what to do where that is known."""
    text = f"{error.strerror or error}."
    if isinstance(error, PermissionError):
        text += " Give this user the right to write there."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += " Free some space there."
    if error.errno == errno.EFBIG:
        text += " Raise the limit on the size of files (ulimit -f)."
    if error.errno in TOO_MANY_OPEN:
        text += f" {RAISE_OPEN_FILES}"
    return text


def write_durably(path: Path, parts: Iterable[bytes | memoryview], mode: int = 0o640) -> None:
    """Create `path` (it must not exist) with `parts` and return when they are on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _errors_name(path):
        _write(os.open(path, flags, mode), parts)


def replace_durably(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `path` with `parts`: after a crash it has all of the old content or all of the new.

    A link is followed, and the file that it leads to is replaced; its mode stays. Raises OSError
    with the file's name, also where `path` is a device or a pipe.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        kind = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(kind, "is not a regular file", str(path))
    # A random name: a process that was killed may have left one under this process's number.
    scratch = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}")
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    try:
        with _errors_name(path, scratch):
            write_durably(scratch, parts, mode=0o666 if mode is None else mode)
            if mode is not None and mode != stat.S_IMODE(scratch.stat().st_mode):
                scratch.chmod(mode)  # what the umask took
            os.replace(scratch, path)
        sync_directory(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def append_durably(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Add `parts` at the end of `path`, which is made where it does not exist."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    with _errors_name(path):
        _write(os.open(path, flags, 0o666), parts)
    sync_directory(path.parent)


def _write(descriptor: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write, wait for the disk, and close."""
    try:
        write_all(descriptor, parts)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _errors_name(path: Path, scratch: Path | None = None) -> Iterator[None]:
    """Put the file's name into errors: those of a descriptor lack it, and that of `scratch` says
    nothing. What was read elsewhere meanwhile keeps its name."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename) == str(scratch):
            error.filename, error.filename2 = str(path), None
        raise


def write_all(descriptor: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write every byte, however few the system takes at a time."""
    for part in parts:
        rest = memoryview(part)
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:  # a full pipe or terminal that another process set so
                room = select.poll()
                room.register(descriptor, select.POLLOUT)
                room.poll()
        del part, rest  # making the next part may need their memory


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, on file systems that can be asked for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some of FUSE and CIFS can't
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as Python has it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
