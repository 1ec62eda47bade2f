"""Whose a temporary directory is: a process's that is at work in it, or nobody's any more."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from megapipe.checkpoint import attempt as module
from megapipe.checkpoint.attempt import Attempt, remove_abandoned


def test_a_directory_is_kept_until_it_is_released(tmp_path: Path) -> None:
    attempt = Attempt()
    folder = attempt.make(tmp_path / "it", mode=0o750)
    (folder / "file").touch()
    assert folder.name.startswith(".tmp-it-")
    assert not remove_abandoned(folder)
    assert (folder / "file").exists()
    attempt.release()
    assert remove_abandoned(folder)
    assert list(tmp_path.iterdir()) == []
    assert remove_abandoned(folder), "gone already"


def test_one_that_is_taken_away_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that clears up: before it is opened, then before it is locked, then for good."""
    seen: list[Path] = []
    opened = module._open

    def interfere(folder: Path) -> int:
        seen.append(folder)
        if len(seen) == 1:
            folder.rmdir()
        descriptor = opened(folder)
        if len(seen) == 2:
            folder.rmdir()
        return descriptor

    monkeypatch.setattr(module, "_open", interfere)
    attempt = Attempt()
    assert attempt.make(tmp_path / "it") == seen[2]
    assert list(tmp_path.iterdir()) == [seen[2]]
    attempt.release()


def test_where_nothing_can_be_locked_it_is_cleared_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refuse)
    attempt = Attempt()
    folder = attempt.make(tmp_path / "it")
    assert remove_abandoned(folder)
    attempt.release()
