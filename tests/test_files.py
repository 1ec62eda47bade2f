"""Files that are whole or not there."""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from megapipe.files import (
    append_durably,
    reason,
    replace_durably,
    sync_directory,
    write_all,
    write_durably,
    write_reason,
)


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


def test_two_writers_of_one_process_take_scratch_files_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def parts() -> Iterator[bytes]:
        replace_durably(path, [b"first"])
        yield b"second"

    replace_durably(path, parts())
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_new_file_is_not_written_over_one_that_is_there(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    link.symlink_to("gone")
    for taken in (path, link):
        with pytest.raises(FileExistsError):
            write_durably(taken, [b"new"])
    assert path.read_text() == "old"
    assert not (tmp_path / "gone").exists()


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


READ_ADVICE = {
    errno.EACCES: " Give this user the right to read it and to enter the directories above it.",
    errno.EMFILE: " Raise the limit on open files (ulimit -n).",
    errno.ENFILE: " Raise the limit on open files (ulimit -n).",
    errno.EIO: "",
}
WRITE_ADVICE = {
    errno.EACCES: " Give this user the right to write there.",
    errno.ENOSPC: " Free some space there.",
    errno.EDQUOT: " Free some space there.",
    errno.EFBIG: " Raise the limit on the size of files (ulimit -f).",
    errno.EMFILE: " Raise the limit on open files (ulimit -n).",
    errno.ENFILE: " Raise the limit on open files (ulimit -n).",
    errno.EIO: "",
}


def test_reasons_say_what_to_do_where_that_is_known() -> None:
    for explain, known in ((reason, READ_ADVICE), (write_reason, WRITE_ADVICE)):
        for number, advice in known.items():
            said = os.strerror(number)
            assert explain(OSError(number, said, "a")) == f"{said}.{advice}"
        assert explain(OSError("no number")) == "no number."


def refuse(number: int) -> Callable[..., NoReturn]:
    def refused(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("write", [append_durably, replace_durably, write_durably])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_errors_name_the_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, list[bytes]], None],
    call: str,
) -> None:
    path = tmp_path / "file"
    monkeypatch.setattr(os, call, refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as caught:
        write(path, [b"x"])
    assert caught.value.filename == str(path)


def test_an_error_of_what_is_read_meanwhile_keeps_its_name(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield (tmp_path / "source").read_bytes()

    with pytest.raises(FileNotFoundError) as caught:
        replace_durably(tmp_path / "copy", parts())
    assert str(caught.value.filename) == str(tmp_path / "source")


def test_a_file_in_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        replace_durably(tmp_path / "none" / "file", [b"x"])
    assert caught.value.filename == str(tmp_path / "none" / "file")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_sync_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(number))
    sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_directory(tmp_path)


@pytest.mark.parametrize("mode", [0o600, 0o666, 0o755])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    replace_durably(path, [b"new"])
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_writing_waits_where_a_pipe_is_full_and_does_not_block() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    content = bytes(range(256)) * 1024  # four times what a pipe holds
    read = bytearray()

    def drain() -> None:
        while part := os.read(reader, 1 << 16):
            read.extend(part)

    thread = threading.Thread(target=drain)
    try:
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"full")
        thread.start()
        write_all(writer, [content])
    finally:
        os.close(writer)
        thread.join()
        os.close(reader)
    assert read.endswith(content)
