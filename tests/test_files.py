"""Files that are whole or not there."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megapipe.files import append_durably, reason, replace_durably


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    for text in (b"old", b"new"):
        replace_durably(path, [text[:1], text[1:]])
        assert path.read_bytes() == text
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_bytes_are_on_the_disk_before_they_get_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append("directory" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    replace_durably(tmp_path / "new", [b"x"])
    assert calls == ["file", "replace", "directory"]


def test_a_failure_leaves_the_old_file_and_no_scratch(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")

    def parts() -> Iterator[bytes]:
        yield b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_durably(path, parts())
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_a_link_leads_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    replace_durably(link, [b"new"])
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_names_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    replace_durably(path, [b"x"])
    assert path.read_bytes() == b"x"


def test_a_pipe_or_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a regular file"):
        replace_durably(tmp_path / "pipe", [b"x"])
    with pytest.raises(IsADirectoryError):
        replace_durably(tmp_path, [b"x"])


def test_appending(tmp_path: Path) -> None:
    append_durably(tmp_path / "log", [b"a", b"b"])
    append_durably(tmp_path / "log", [b"c"])
    assert (tmp_path / "log").read_bytes() == b"abc"


def test_reasons_say_what_to_do_where_that_is_known() -> None:
    closed = PermissionError(errno.EACCES, "Permission denied", "a")
    assert reason(closed).startswith("Permission denied. Give this user the right to read it")
    assert reason(OSError(errno.EIO, "Input/output error")) == "Input/output error."
    assert reason(OSError("no number")) == "no number."
