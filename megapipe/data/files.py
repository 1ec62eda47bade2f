"""Which files a path or glob names: each real file once, and nothing left out in silence.

`glob` of the standard library can't be used: it passes over directories that may not be listed,
and follows a link to a directory above it 40 times.
"""

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from megapipe.amounts import counted
from megapipe.errors import DataError
from megapipe.files import reason, shown

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
TABLES = ("parquet", "arrow")
COMPRESSED = (".gz", ".zst")
MAGIC = re.compile(r"[*?[]")
SAMPLE_BYTES = 4096
SAMPLES = 6
"""Parts of a file that its fingerprint is taken of, the first and the last among them."""


class FoundFile(NamedTuple):
    """`identity` is the file's (device, inode): the same for all of its names."""

    path: Path
    size: int
    identity: tuple[int, int]


@dataclass(frozen=True)
class Found:
    """Files in sorted order, and `repeats`: further names of the same files, which are not read."""

    files: tuple[FoundFile, ...]
    repeats: tuple[Path, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        return f"{counted(len(self.files), 'file')}, {counted(self.size, 'byte')}"


def file_format(path: Path) -> str | None:
    """text, jsonl, parquet or arrow, by the file's name; None when it doesn't say."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    found = FORMATS.get(suffix.lower())
    return None if path.suffix in COMPRESSED and found in TABLES else found


def find_files(pattern: str, key: str, *, may_be_gone: bool = False) -> Found:
    """The files that a path or glob names, in sorted order.

    Raises DataError, naming `key`, where there are none (unless they `may_be_gone`), and for what
    can't be read: a directory, a link that leads nowhere, a pipe, a directory that may not be
    listed.
    """
    named = f'{key} = "{shown(pattern)}"'
    if "\0" in pattern:
        raise DataError(f"{named} has a NUL character, which no path can have.")
    if not pattern:
        raise DataError(f"{named} is empty; name a file or a glob.")
    if os.path.isdir(pattern):
        raise DataError(
            f"{named} is a directory; name files in it, as in "
            f'"{shown(pattern).rstrip("/")}/**/*.txt".'
        )
    names = {pattern} if os.path.lexists(pattern) else set(_match(pattern, named))
    found = _each_once(sorted(map(Path, names)), named)
    if not found.files and not may_be_gone:
        hint = " In a glob, a [ that is part of a name is written [[]." if "[" in pattern else ""
        raise DataError(f"{named} matches no file (looked from {_here()}); correct the path.{hint}")
    return found


def files_below(directory: Path, key: str) -> Found:
    """Files in a directory and below it, hidden ones too, whose names say how they are read."""
    named = f"{key}: {shown(directory)}"
    entries = (
        entry for d in _directories(str(directory), named, True) for entry in _list(d, named)
    )
    paths = sorted(path for path in map(Path, entries) if file_format(path))
    return _each_once([path for path in paths if not path.is_dir()], named)


def glob_matches(pattern: str, path: str) -> bool:
    """Whether a path matches a pattern as `find_files` understands it, without looking at the
    disk: `*`, `?` and `[]` within a name, `**` for any directories."""
    pattern, path = os.path.normpath(pattern), os.path.normpath(path)
    parts = [part for part in pattern.split("/") if part]
    names = [name for name in path.split("/") if name]
    return pattern == path or (
        pattern.startswith("/") == path.startswith("/") and _match_names(parts, names)
    )


def _match_names(parts: list[str], names: list[str]) -> bool:
    if not parts:
        return not names
    part, *rest = parts
    if part == "**":
        return any(
            _match_names(rest or ["*"], names[skipped:]) for skipped in range(len(names) + 1)
        )
    return bool(names) and fnmatch.fnmatchcase(names[0], part) and _match_names(rest, names[1:])


def fixed_part(pattern: str) -> Path:
    """The directory that a path or glob begins with, in front of all that is a pattern."""
    if os.path.lexists(pattern):
        return Path(pattern).parent
    parts = Path(pattern).parts[:-1]
    plain = next((n for n, part in enumerate(parts) if MAGIC.search(part)), len(parts))
    return Path(*parts[:plain])


def fingerprint(path: Path, size: int) -> str:
    """Changes with a file's content, though only its head, tail and some samples are read.

    Raises DataError where the file can't be read or has another size.
    """
    digest = xxhash.xxh3_128(str(size).encode())
    with open_unchanged(path, size) as file:
        last = max(0, size - SAMPLE_BYTES)
        places = {last * part // (SAMPLES - 1) for part in range(SAMPLES)}
        try:
            for place in sorted(places):
                file.seek(place)
                digest.update(file.read(SAMPLE_BYTES))
        except OSError as error:
            raise DataError(f"{shown(path)}: can't be read: {reason(error)}") from error
    return digest.hexdigest()


def open_unchanged(path: Path, size: int | None) -> BinaryIO:
    """Opens a file. Raises DataError where its size isn't that found at the start, if given."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(_unreadable(path, error, vanished=size is not None)) from error
    try:
        check_unchanged(file, path, size)
    except DataError:
        file.close()
        raise
    return file


def check_unchanged(file: BinaryIO, path: Path, size: int | None) -> None:
    """Raises DataError where an open file no longer has the size found at the start, if given."""
    now = os.fstat(file.fileno()).st_size
    if size is not None and now != size:
        raise DataError(
            f"{shown(path)}: has {counted(now, 'byte')} now and had {size:,} when this run "
            "started. Data files must not change while a run reads them: restore it and start "
            "again; the run goes on from its last checkpoint."
        )


def _unreadable(path: Path, error: OSError, *, vanished: bool) -> str:
    message = f"{shown(path)}: can't be read: {reason(error)}"
    if isinstance(error, FileNotFoundError) and vanished:
        message += (
            " It was there when this run started: put it back and start again; the run goes on "
            "from its last checkpoint."
        )
    return message


def _here() -> str:
    try:
        return shown(os.getcwd())
    except FileNotFoundError:
        return "a directory that is gone"


# --- Patterns ------------------------------------------------------------------------------------


def _match(pattern: str, named: str) -> Iterator[str]:
    """Names that match as in `glob`: * ? [] within a name, ** any directories; hidden ones only
    where the pattern has the dot."""
    parts: list[str] = []
    for part in filter(None, pattern.split("/")):
        plain = not MAGIC.search(part)
        if plain and parts and not MAGIC.search(parts[-1]):
            parts[-1] += f"/{part}"
        elif not (part == "**" and parts[-1:] == ["**"]):
            parts.append(part)
    return _expand("/" if pattern.startswith("/") else "", parts, named)


def _expand(base: str, parts: list[str], named: str) -> Iterator[str]:
    part, *rest = parts
    if part == "**":
        for directory in _directories(base, named, hidden=False):
            yield from _expand(directory, rest or ["*"], named)
        return
    if not MAGIC.search(part):
        found = [os.path.join(base, part)]
    else:
        matches = re.compile(fnmatch.translate(part)).match
        found = [
            path
            for path in _list(base, named)
            if matches(name := os.path.basename(path)) and _may_be_hidden(name, part)
        ]
    for path in found:
        if rest and os.path.islink(path):
            _stat(Path(path), named)  # raises where it leads nowhere
        if rest:
            yield from _expand(path, rest, named)
        elif _lexists(path, named):
            yield path


def _may_be_hidden(name: str, part: str) -> bool:
    """Whether `part` of a pattern can match `name`: hidden names only if it has the dot."""
    return part.startswith(".") or not name.startswith(".")


def _directories(base: str, named: str, hidden: bool) -> Iterator[str]:
    """`base` and the directories below it; each real one once, so that links can't make loops."""
    entered: set[str] = set()
    waiting = [base]
    while waiting:
        directory = waiting.pop()
        identity = _real_directory(directory or ".", named)
        if identity is None or identity in entered:
            continue
        entered.add(identity)
        yield directory
        names = [
            name
            for name in _list(directory, named)
            if (hidden or not os.path.basename(name).startswith(".")) and _is_directory(name, named)
        ]
        waiting += reversed(names)


def _is_directory(path: str, named: str) -> bool:
    """Raises DataError where that can't be known: a link that leads nowhere, a locked directory."""
    return stat.S_ISDIR(_stat(Path(path), named).st_mode)


def _real_directory(path: str, named: str) -> str | None:
    """The path without links. Inode numbers would not do: some network disks give them twice."""
    if not _lexists(path, named):
        return None
    found = _stat(Path(path), named)
    return os.path.realpath(path) if stat.S_ISDIR(found.st_mode) else None


def _list(directory: str, named: str) -> list[str]:
    """Paths of a directory's entries, sorted; none where there is no such directory."""
    try:
        return [os.path.join(directory, name) for name in sorted(os.listdir(directory or "."))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(
            f"{named}: the directory {shown(directory)} can't be listed: {error.strerror}. Give "
            "this user the right to read it, or name other files."
        ) from error


def _lexists(path: str, named: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise DataError(f"{named}: {shown(path)} can't be read: {reason(error)}") from error
    return True


# --- What the names stand for --------------------------------------------------------------------


def _each_once(paths: list[Path], named: str) -> Found:
    """The regular files among `paths`. A directory with a file's name is an error, unless something
    in it is among the paths too."""
    entered = {parent for path in paths for parent in path.parents}
    files: list[FoundFile] = []
    repeats: list[Path] = []
    known: dict[tuple[int, int], Path] = {}
    for path in paths:
        found = _stat(path, named)
        if stat.S_ISDIR(found.st_mode):
            if file_format(path) and path not in entered:
                raise DataError(
                    f'{named}: {shown(path)} is a directory; name the files in it, as in "'
                    f'{shown(path)}/*", or match only files.'
                )
            continue
        if not stat.S_ISREG(found.st_mode):
            raise DataError(
                f"{named}: {shown(path)} is {_kind(found.st_mode)} and not a file. A run reads "
                "its data more than once: write it to a file, or match only files."
            )
        identity = (found.st_dev, found.st_ino)
        first = known.setdefault(identity, path)
        # Some network disks give an inode number twice: it alone does not make a repeat.
        if first is not path and (found.st_nlink > 1 or path.resolve() == first.resolve()):
            repeats.append(path)
            continue
        files.append(FoundFile(path, found.st_size, identity))
    return Found(tuple(files), tuple(repeats))


def _stat(path: Path, named: str) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
            raise DataError(
                f"{named}: {shown(path)} is a link to {shown(path.readlink())}, which leads to no "
                "file. Repair or remove the link."
            ) from error
        raise DataError(f"{named}: {shown(path)} can't be read: {reason(error)}") from error


def _kind(mode: int) -> str:
    kinds: dict[Callable[[int], bool], str] = {
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for holds, name in kinds.items() if holds(mode)), "something else")
