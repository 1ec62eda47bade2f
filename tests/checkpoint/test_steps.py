"""Names, the commit, and what is left when a process dies between its two renames."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.retention import newest_valid
from megapipe.checkpoint.steps import (
    check_names,
    clear_leftovers,
    commit,
    committed,
    has_manifest,
    latest,
    remove,
    step_name,
)
from megapipe.errors import CheckpointError
from tests.checkpoint.samples import leftovers, save_sample


def test_only_committed_directories_count(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "gone") is None
    nine, ten = save_sample(tmp_path, 9), save_sample(tmp_path, 10)
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-000000013").mkdir()  # not how 13 is written
    (tmp_path / "step-000000013" / "manifest.json").touch()
    (tmp_path / "step-00000014").symlink_to(tmp_path / "gone")
    (tmp_path / "step-00000015").touch()
    (tmp_path / ".old-step-00000017-12ab12ab").symlink_to(ten)
    temporary = tmp_path / ".tmp-step-00000016-0a0a0a0a"
    temporary.mkdir()
    (temporary / "manifest.json").touch()
    assert committed(tmp_path) == {10: ten, 9: nine}
    assert list(committed(tmp_path)) == [10, 9]
    assert latest(tmp_path) == ten


def test_a_lost_manifest_is_damage_and_not_an_absence(tmp_path: Path) -> None:
    """A run must not start anew over it."""
    path = save_sample(tmp_path, 5)
    (path / "manifest.json").unlink()
    assert committed(tmp_path) == {5: path}
    found = newest_valid(tmp_path)
    assert found.path is None
    (skipped,) = found.skipped
    assert skipped.path == path
    assert "holds no manifest.json" in skipped.problems[0]


def test_steps_of_more_than_eight_digits(tmp_path: Path) -> None:
    save_sample(tmp_path, 99_999_999)
    path = save_sample(tmp_path, 100_000_000)
    assert path.name == step_name(100_000_000) == "step-100000000"
    assert latest(tmp_path) == path


def test_killed_while_replacing(tmp_path: Path) -> None:
    """The old one, moved aside, counts until it is whole again under its name or replaced."""
    path = save_sample(tmp_path, 3)
    aside = path.rename(tmp_path / ".old-step-00000003-12ab12ab")
    assert latest(tmp_path) == aside
    assert newest_valid(tmp_path).path == aside
    clear_leftovers(tmp_path)
    assert latest(tmp_path) == path
    assert leftovers(tmp_path) == []
    # Killed a moment later: both are there, and the new one counts.
    path.rename(tmp_path / ".old-step-00000003-12ab12ab")
    path.mkdir()
    (path / "manifest.json").touch()
    assert latest(tmp_path) == path
    clear_leftovers(tmp_path)
    assert leftovers(tmp_path) == []


def test_a_link_to_a_checkpoint_counts(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    path = save_sample(root, 9)
    moved = path.rename(tmp_path / "moved")
    path.symlink_to(moved)
    assert committed(root) == {9: path}
    assert newest_valid(root).path == path
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert newest_valid(linked).path == linked / path.name


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    moved = save_sample(tmp_path, 3).rename(tmp_path / "moved")
    (tmp_path / "step-00000003").symlink_to(moved)
    with pytest.raises(CheckpointError, match="step-00000003 is in the way: it is a symbolic link"):
        save_sample(tmp_path, 3)
    assert open_checkpoint(moved).verify() == []


def test_a_directory_without_a_manifest_is_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "notes").write_text("mine")
    path = save_sample(tmp_path, 3)
    (aside,) = [entry for entry in tmp_path.iterdir() if entry != path]
    assert aside.name.startswith("step-00000003-replaced-")
    assert (aside / "notes").read_text() == "mine"
    assert committed(tmp_path) == {3: path}


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("step-00000007", lambda path: path.symlink_to("gone"), "a symbolic link to gone, which"),
        ("step-00000007", Path.touch, "is not a directory"),
        ("Step-00000007", Path.mkdir, "rename it to step-00000007"),
        ("STEP_7", Path.mkdir, "rename it to step-00000007"),
        ("step-7", Path.mkdir, "rename it to step-00000007"),
        ("step-000000007", Path.mkdir, "rename it to step-00000007"),
    ],
)
def test_what_only_looks_like_a_checkpoint_is_told(
    tmp_path: Path, name: str, make: Callable[[Path], None], said: str
) -> None:
    save_sample(tmp_path, 5)
    for other in ("latest", "step-00000005.old", "step-notes", "best-step-00000005"):
        (tmp_path / other).touch()
    (tmp_path / "newest").symlink_to("gone")  # a link of the user's own
    check_names(tmp_path)
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=said):
        check_names(tmp_path)


def test_a_root_that_is_none_is_told(tmp_path: Path) -> None:
    check_names(tmp_path / "gone")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(CheckpointError, match="link is a symbolic link to gone, which"):
        check_names(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is not a directory"):
        check_names(tmp_path / "file")


def test_a_root_that_can_not_be_listed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    for looks in (check_names, committed, clear_leftovers):
        with pytest.raises(CheckpointError, match=r"can't be read: Permission denied"):
            looks(tmp_path)


def test_a_directory_that_can_not_be_looked_into_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_manifest(tmp_path)
    path = save_sample(tmp_path, 3)
    assert has_manifest(path)

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(CheckpointError, match=r"step-00000003 can't be read: Permission denied"):
        has_manifest(path)


@pytest.mark.parametrize("manifest", [True, False])
def test_names_are_on_the_disk_before_what_they_replace_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: bool
) -> None:
    """Without a manifest, what is replaced is kept, and its new name is on the disk as well."""
    path = save_sample(tmp_path, 3)
    if not manifest:
        (path / "manifest.json").unlink()
    temporary = save_sample(tmp_path, 4).rename(tmp_path / ".tmp-step-00000003-0a0a0a0a")
    calls: list[str] = []

    def note(call: str) -> Callable[[Path], None]:
        return lambda path: calls.append(f"{call} {len(list(tmp_path.iterdir()))} {path.name}")

    monkeypatch.setattr("megapipe.checkpoint.steps.sync_directory", note("sync"))
    monkeypatch.setattr("megapipe.checkpoint.steps.remove_tree", note("remove"))
    commit(temporary, 3)
    (other,) = [entry.name for entry in tmp_path.iterdir() if entry != path]
    first = f"sync 2 {temporary.name}"
    renamed = f"sync 2 {tmp_path.name}"
    assert calls == [first, renamed, *[f"remove 2 {other}"] * manifest]
    assert other.startswith(".old-step-00000003-" if manifest else "step-00000003-replaced-")


def test_clearing_leaves_everything_else_alone(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in (".tmp-notes", ".old-notes", "step-notes", ".hidden")]
    for path in kept:
        path.mkdir()
    kept += [tmp_path / ".tmp-step-00000002-00000000", tmp_path / ".tmp-step-00000003-00000000"]
    kept[-2].symlink_to(kept[0])
    kept[-1].touch()
    (tmp_path / ".tmp-step-00000001-00000000").mkdir()
    clear_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    clear_leftovers(tmp_path / "gone")


def test_a_file_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").write_text("mine")
    with pytest.raises(CheckpointError, match="step-00000003 is in the way"):
        save_sample(tmp_path, 3)
    assert (tmp_path / "step-00000003").read_text() == "mine"
    assert leftovers(tmp_path) == []


def test_a_commit_that_fails_puts_the_old_one_back(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    with pytest.raises(FileNotFoundError):
        commit(tmp_path / ".tmp-step-00000003-gone", 3)
    assert open_checkpoint(path).verify() == []
    assert leftovers(tmp_path) == []


def test_remove(tmp_path: Path) -> None:
    remove(save_sample(tmp_path, 3))
    assert list(tmp_path.iterdir()) == []
