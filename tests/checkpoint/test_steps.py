"""Names, the commit, and what is left when a process dies between its two renames."""

from pathlib import Path

import pytest

from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.retention import newest_valid
from megapipe.checkpoint.steps import clear_leftovers, commit, committed, latest, remove, step_name
from megapipe.errors import CheckpointError
from tests.checkpoint.samples import leftovers, save_sample


def test_only_committed_directories_count(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "gone") is None
    nine, ten = save_sample(tmp_path, 9), save_sample(tmp_path, 10)
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-000000013").mkdir()  # not how 13 is written
    (tmp_path / "step-000000013" / "manifest.json").touch()
    (tmp_path / "step-00000014").symlink_to(ten)
    (tmp_path / "step-00000015").touch()
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
    assert open_checkpoint(aside).verify() == []
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


def test_clearing_leaves_everything_else_alone(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in (".tmp-notes", ".old-notes", "step-notes", ".hidden")]
    for path in kept:
        path.mkdir()
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
