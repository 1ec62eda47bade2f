"""Names in a checkpoint root, and the one rename that commits a checkpoint.

    step-00000100/               committed: whole when it got this name
    .tmp-step-00000100-<token>/  being written, being removed, or left by a run that was killed
    .old-step-00000100-<token>/  a committed one that is being replaced by a newer save of its step

Replacing takes two renames (the old one aside, the new one in), because not every file system can
swap directories. A process killed between them leaves the old one aside, whole: it then still
counts as its step's checkpoint, and `clear_leftovers` gives it back its name.

One run at a time writes to a root.
"""

import os
import re
import secrets
from pathlib import Path

from megapipe.checkpoint.storage import remove_tree, sync_directory
from megapipe.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
COMMITTED = re.compile(r"(?P<name>step-(?P<step>\d{8,18}))")
REPLACED = re.compile(r"\.old-(?P<name>step-(?P<step>\d{8,18}))-[0-9a-f]+")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def temporary_name(step_directory: str) -> str:
    return f".tmp-{step_directory}-{secrets.token_hex(4)}"


def committed(root: Path) -> dict[int, Path]:
    """Directory of each committed step, newest step first.

    One whose manifest is gone still counts: it got its name by a commit, so it is a damaged
    checkpoint, to be told of, and not a leftover.
    """
    if not root.is_dir():
        return {}
    found: dict[int, Path] = {}
    for pattern in (REPLACED, COMMITTED):
        for entry in root.iterdir():
            match = pattern.fullmatch(entry.name)
            if match and match["name"] == step_name(int(match["step"])) and _is_directory(entry):
                found[int(match["step"])] = entry
    return dict(sorted(found.items(), reverse=True))


def _is_directory(entry: Path) -> bool:
    return not entry.is_symlink() and entry.is_dir()


def latest(root: Path) -> Path | None:
    """Directory of the newest committed step, unread: see `retention.newest_valid`."""
    return next(iter(committed(root).values()), None)


def clear_leftovers(root: Path) -> None:
    """Remove what killed runs left half-written, and finish what they left half-replaced."""
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        replaced = REPLACED.fullmatch(entry.name)
        if replaced and not (root / replaced["name"]).exists():
            entry.rename(root / replaced["name"])
        elif replaced or entry.name.startswith(".tmp-step-"):
            remove_tree(entry)


def commit(temporary: Path, step: int) -> Path:
    """Give a finished temporary directory its committed name, durably; returns the new path.

    A committed checkpoint of the same step is replaced: the run that saves now is the one whose
    steps count from here on.
    """
    root = temporary.parent
    target = root / step_name(step)
    sync_directory(temporary)
    if not os.path.lexists(target):
        temporary.rename(target)
        sync_directory(root)
        return target
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target} is in the way: it is not a directory; move it elsewhere")
    aside = root / f".old-{target.name}-{secrets.token_hex(4)}"
    target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        aside.rename(target)
        raise
    sync_directory(root)
    remove_tree(aside)
    return target


def remove(directory: Path) -> None:
    """Take away a committed checkpoint: its name vanishes at once, its bytes after that."""
    assert COMMITTED.fullmatch(directory.name), directory
    doomed = directory.rename(directory.parent / temporary_name(directory.name))
    remove_tree(doomed)
