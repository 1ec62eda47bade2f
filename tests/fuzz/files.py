"""Folders of random files, some of them whole and some of them not."""

import contextlib
import os
import socket
import tarfile
from io import BytesIO
from pathlib import Path
from random import Random

from tests.fuzz.text import (
    ENCODINGS,
    NAMES,
    bad_json_line,
    compress,
    damage,
    document,
    json_line,
    table,
)

TEXT = (".txt", ".md", ".py", ".rst", ".text")
FORMATS = (".txt", ".txt", ".jsonl", ".jsonl", ".parquet", ".arrow", ".md", ".json", ".ndjson")


def make_corpus(folder: Path, random: Random, *, odd: float) -> str:
    """Some files of one format, and the glob that names them.

    `odd` is how likely each file is to be damaged, oddly encoded, or of an odd name or kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    suffix = random.choice(FORMATS)
    packed = random.choice(("", "", ".gz", ".zst")) if _is_text(suffix) else ""
    for number in range(random.choice((1, 1, 2, 3, 6))):
        strange = random.random() < odd
        name = random.choice(NAMES) if random.random() < odd else f"part-{number}"
        path = folder / f"{name}{suffix}{packed}"
        if strange and random.random() < 0.4:
            _place_odd_thing(path, random)
        else:
            _write(path, _content(suffix, packed, number, random, strange))
    exact = random.choice(list(folder.iterdir()) or [folder])
    patterns = [f"{folder.name}/*{suffix}{packed}"] * 3
    patterns += [f"{folder.name}/**/*", f"{folder.name}/{exact.name}", str(folder / "*")]
    return random.choice(patterns)


def _is_text(suffix: str) -> bool:
    return suffix not in (".parquet", ".arrow")


def _write(path: Path, data: bytes) -> None:
    with contextlib.suppress(OSError):  # a name that is too long, or taken
        path.write_bytes(data)


def _content(suffix: str, packed: str, number: int, random: Random, strange: bool) -> bytes:
    texts = [
        document(random, number * 100 + row, random.choice((5, 60, 60, 900)))
        for row in range(random.choice((1, 4, 12)))
    ]
    if not _is_text(suffix):
        data = _table(texts, suffix, random, strange)
        return damage(data, random) if strange and random.random() < 0.4 else data
    if suffix in TEXT:
        data = random.choice(("\n", "\n\n", "\r\n", "\r\n\r\n")).join(texts).encode()
    else:
        lines = [json_line(random, text).encode() for text in texts]
        if strange:
            lines.insert(random.randint(0, len(lines)), bad_json_line(random))
        data = b"\n".join(lines) + random.choice((b"", b"\n", b"\n\n"))
    if strange and random.random() < 0.3:
        data = data.decode(errors="replace").encode(random.choice(ENCODINGS), "replace")
    if packed:
        data = compress(data, packed, random)
    if strange and random.random() < 0.5:
        data = damage(data, random)
    return data


def _table(texts: list[str], suffix: str, random: Random, strange: bool) -> bytes:
    rows: list[object] = list(texts)
    if strange:
        kinds: list[list[object]] = [
            [None],
            [*rows, None, ""],
            [1, 2],
            [[text] for text in texts],
            [{"a": text} for text in texts],
            [text.encode() for text in texts],
            [],
        ]
        rows = random.choice(kinds)
    column = "content" if strange and random.random() < 0.2 else "text"
    return table(rows, suffix.removeprefix("."), random, column)


def _place_odd_thing(path: Path, random: Random) -> None:
    """Something at `path` that is no plain file of its format."""
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 5
        tar.addfile(member, BytesIO(b"text\n"))
    things = {
        "directory": lambda: path.mkdir(),
        "fifo": lambda: os.mkfifo(path),
        "socket": lambda: socket.socket(socket.AF_UNIX).bind(os.fsencode(path)),
        "dangling": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to(path.name),
        "up": lambda: path.with_name("up").symlink_to(".."),
        "device": lambda: path.symlink_to("/dev/zero"),
        "twice": lambda: _twice(path),
        "unreadable": lambda: _unreadable(path),
        "closed folder": lambda: path.with_name("closed").mkdir(mode=0),
        "empty": lambda: path.touch(),
        "zeros": lambda: path.write_bytes(bytes(5000)),
        "archive": lambda: path.write_bytes(archive.getvalue()),
        "blank": lambda: path.write_bytes(b" \n\n\t\n" * 3),
    }
    with contextlib.suppress(OSError):
        things[random.choice(list(things))]()


def _twice(path: Path) -> None:
    path.write_text("a file that two names lead to\n" * 5)
    path.with_name(f"again-{path.name}").symlink_to(path.name)


def _unreadable(path: Path) -> None:
    path.write_text("may not be read\n")
    path.chmod(0)


def make_removable(folder: Path) -> None:
    """Give back the rights that are needed to remove a folder."""
    for parent, names, _ in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(0o700)
