"""Directories that are there when they are whole: two writers, and what a killed one left."""

from pathlib import Path

import pytest

from megapipe.conversion.new_directory import write_new_directory
from megapipe.errors import CheckpointError


def write(folder: Path) -> None:
    (folder / "file").write_text("whole")


def test_a_second_writer_takes_nothing_from_the_first(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def come_second(folder: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            write_new_directory(target, 5, write)
        assert f"{target} is being written by another process, in {folder}. Wait" in str(
            caught.value
        )

    assert write_new_directory(target, 5, write, accept=come_second) == target
    assert (target / "file").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(CheckpointError, match="exists already"):
        write_new_directory(target, 5, write)


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    target = tmp_path / "model"
    left = tmp_path / ".tmp-model-0123abcd"
    left.mkdir()
    write(left)
    write_new_directory(target, 5, write)
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_writer_is_in_nobodys_way(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise CheckpointError("not proven")

    target = tmp_path / "model"
    with pytest.raises(CheckpointError, match="not proven"):
        write_new_directory(target, 5, write, accept=fail)
    assert list(tmp_path.iterdir()) == []
    write_new_directory(target, 5, write)
    assert list(tmp_path.iterdir()) == [target]
