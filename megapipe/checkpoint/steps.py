"""Names in a checkpoint root, and the one rename that commits a checkpoint.

    step-00000100/               committed: whole when it got this name
    .tmp-step-00000100-<token>/  being written, being removed, or left by a run that was killed
                                 (see `attempt`)
    .old-step-00000100-<token>/  a committed one that is being replaced by a newer save of its step

Replacing takes two renames (the old one aside, the new one in), because not every file system can
swap directories. A process killed between them leaves the old one aside, whole: it then still
counts as its step's checkpoint, and `clear_leftovers` gives it back its name.

A committed name may also be a symbolic link to a checkpoint on another disk: it is read like any
other, and neither removed nor replaced. Other links are left alone.

One run at a time writes to a root.

A checkpoint of weights alone has any name and place. While it is being written it lies beside that
as .tmp-<name>-<token>, and one rename commits it.
"""

import os
import re
import secrets
from pathlib import Path

from megapipe.checkpoint.attempt import remove_abandoned, temporary_name
from megapipe.checkpoint.storage import remove_tree
from megapipe.errors import CheckpointError
from megapipe.files import reason, shown, sync_directory

MANIFEST_NAME = "manifest.json"
COMMITTED = re.compile(r"(?P<name>step-(?P<step>\d{8,18}))")
SIMILAR = re.compile(r"step[-_ ]?(?P<step>\d{1,18})", re.IGNORECASE)
REPLACED = re.compile(r"\.old-(?P<name>step-(?P<step>\d{8,18}))-[0-9a-f]+")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def committed(root: Path) -> dict[int, Path]:
    """Directory of each committed step, newest step first.

    One whose manifest is gone still counts: it got its name by a commit, so it is a damaged
    checkpoint, to be told of, and not a leftover.
    """
    entries = _entries(root)
    found: dict[int, Path] = {}
    for pattern in (REPLACED, COMMITTED):
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match is None or match["name"] != step_name(int(match["step"])):
                continue
            if entry.is_dir() and not (pattern is REPLACED and entry.is_symlink()):
                found[int(match["step"])] = entry
    return dict(sorted(found.items(), reverse=True))


def has_manifest(directory: Path) -> bool:
    """It is a checkpoint. Raises CheckpointError where this user may not see that."""
    try:
        return (directory / MANIFEST_NAME).exists()
    except OSError as error:
        raise _unreadable(directory, error) from error


def other_stack(directory: Path) -> str | None:
    """Whose model a directory without a manifest seems to be, by the names in it; for messages."""
    names = {entry.name for entry in _entries(directory)}
    if "config.json" in names:
        return "Hugging Face's"
    return "Megatron's" if "latest_checkpointed_iteration.txt" in names else None


def refuse_exports(root: Path) -> None:
    """Raises CheckpointError where a run's exports lie in `root`, whose names are those of its
    checkpoints."""
    newest = latest(root)
    if newest is not None and not has_manifest(newest) and other_stack(newest):
        raise CheckpointError(
            f"{shown(root)} holds exports, not checkpoints. Name one of them, such as "
            f"{shown(newest)}."
        )


def check_names(root: Path) -> None:
    """Raises CheckpointError for what looks like a checkpoint and can't be used as one.

    A run that did not see it would start over, or go on from an older checkpoint.
    """
    for entry in (root, *_entries(root)):
        if entry.is_symlink() and not entry.exists() and (entry == root or _similar(entry)):
            raise CheckpointError(
                f"{entry} is a symbolic link to {entry.readlink()}, which is not there. Put that "
                "back, or remove the link."
            )
    if root.exists() and not root.is_dir():
        raise CheckpointError(f"{root} is not a directory. Move it elsewhere.")
    for entry in _entries(root):
        step = _similar(entry)
        if step is None:
            continue
        if not entry.is_dir():
            raise CheckpointError(f"{entry} is not a directory, as its name says. Move it away.")
        if entry.name != step_name(step):
            raise CheckpointError(
                f"{entry} is not named as checkpoints are. If it is one, rename it to "
                f"{step_name(step)}, or else move it out of {root}."
            )


def _similar(entry: Path) -> int | None:
    """The step of a checkpoint that a person would take the entry for."""
    match = SIMILAR.fullmatch(entry.name)
    return int(match["step"]) if match else None


def _entries(root: Path) -> list[Path]:
    """What the directory holds, or nothing where there is none."""
    try:
        return sorted(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(root, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{shown(path)} can't be read: {reason(error)}")


def latest(root: Path) -> Path | None:
    """Directory of the newest committed step, unread: see `retention.newest_valid`."""
    return next(iter(committed(root).values()), None)


def clear_leftovers(root: Path) -> None:
    """Remove what killed runs left half-written, and finish what they left half-replaced.

    What a process is writing now stays.
    """
    for entry in _entries(root):
        if entry.is_symlink() or not entry.is_dir():
            continue
        replaced = REPLACED.fullmatch(entry.name)
        if replaced and not (root / replaced["name"]).exists():
            entry.rename(root / replaced["name"])
        elif replaced:
            remove_tree(entry)
        elif entry.name.startswith(".tmp-step-"):
            remove_abandoned(entry)


def commit(temporary: Path, step: int) -> Path:
    """Give a finished temporary directory its committed name, durably; returns the new path.

    A committed checkpoint of the same step is replaced: the run that saves now is the one whose
    steps count from here on. A directory without a manifest is nobody's checkpoint: it is kept
    under the name step-NNNNNNNN-replaced-<token>. A link is an error.
    """
    root = temporary.parent
    target = root / step_name(step)
    sync_directory(temporary)
    if not os.path.lexists(target):
        temporary.rename(target)
        sync_directory(root)
        return target
    if target.is_symlink() or not target.is_dir():
        kind = "a symbolic link" if target.is_symlink() else "not a directory"
        raise CheckpointError(f"{target} is in the way: it is {kind}; move it elsewhere")
    aside = root / f".old-{target.name}-{secrets.token_hex(4)}"
    target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        aside.rename(target)
        raise
    if (aside / MANIFEST_NAME).is_file():
        sync_directory(root)
        remove_tree(aside)
    else:
        aside.rename(root / f"{target.name}-replaced-{secrets.token_hex(4)}")
        sync_directory(root)
    return target


def require_free(target: Path) -> None:
    """Raises CheckpointError where something, even a link that leads nowhere, has that name."""
    if os.path.lexists(target):
        raise CheckpointError(
            f"{shown(target)} exists already. Name another directory, or move that one away."
        )


def clear_attempts(target: Path) -> None:
    """Remove what was left beside `target` by processes that were killed while they wrote it.

    Raises CheckpointError where a process is writing it now.
    """
    attempt = re.compile(re.escape(f".tmp-{target.name}-") + "[0-9a-f]{8}")
    for entry in _entries(target.parent):
        if not attempt.fullmatch(entry.name) or entry.is_symlink() or not entry.is_dir():
            continue
        if not remove_abandoned(entry):
            raise CheckpointError(
                f"{shown(target)} is being written by another process, in {shown(entry)}. Wait for "
                "its end, or name another directory."
            )


def commit_new(temporary: Path, target: Path) -> Path:
    """Give a finished temporary directory beside `target` that name, durably; returns `target`.

    Raises CheckpointError where the name was taken meanwhile.
    """
    sync_directory(temporary)
    require_free(target)
    temporary.rename(target)
    sync_directory(target.parent)
    return target


def remove(directory: Path) -> None:
    """Take away a committed checkpoint: its name vanishes at once, its bytes after that."""
    assert COMMITTED.fullmatch(directory.name), directory
    assert not directory.is_symlink(), directory
    doomed = directory.rename(directory.parent / temporary_name(directory.name))
    remove_tree(doomed)
