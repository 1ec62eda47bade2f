"""Consoles that are closed, full or narrow, as a process of its own meets them."""

import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megapipe.tools.console import OutputError, Stream

CLOSED = ">&-"
FULL = "> /dev/full"


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`megapipe` in it is the command; the status is that of the last part of a pipe."""
    script = f'megapipe() {{ "{sys.executable}" -m megapipe "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(("where", "why"), [(CLOSED, "it is closed"), (FULL, "No space left on")])
@pytest.mark.parametrize("command", ["schema", "--help", "plan --help"])
def test_output_that_is_not_delivered_is_an_error(
    tmp_path: Path, command: str, where: str, why: str
) -> None:
    done = shell(f"megapipe {command} {where}", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"megapipe: standard output can't be written: {why}")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    done = shell("megapipe schema | true; echo ${PIPESTATUS[0]}", tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_nothing_at_all_to_talk_to(tmp_path: Path) -> None:
    assert shell("megapipe inspect nothing <&- >&- 2>&-", tmp_path).returncode == 1


@pytest.mark.parametrize("layout", ["", "--parallel.tensor=2"])
@pytest.mark.parametrize(("where", "why"), [(CLOSED, "it is closed"), ("| true", "Broken pipe")])
def test_a_training_goes_on_without_a_console(
    corpus: Path, tmp_path: Path, where: str, why: str, layout: str
) -> None:
    words = f"train run.toml --train.steps=2 --train.run_dir={tmp_path}/run {layout}"
    done = shell(f"megapipe {words} {where}; exit ${{PIPESTATUS[0]}}", corpus)
    assert done.returncode == 0
    assert done.stderr.count("warning: standard output can't be written: " + why) in (1, 2)
    assert "Traceback" not in done.stderr
    assert "megapipe: " not in done.stderr  # which begins a line that ends a command
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").exists()


def test_a_current_directory_that_was_removed(tmp_path: Path) -> None:
    program = f"{sys.executable} -P -m megapipe train x.toml"
    done = shell(f"mkdir gone; cd gone; rmdir ../gone; {program}", tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("megapipe: the current directory can't be used (No such file")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_console_that_can_not_say_everything(tmp_path: Path, encoding: str) -> None:
    for word, shown in (("漢.toml", r"\u6f22.toml"), ("caf\udce9.toml", r"\xe9.toml")):
        done = shell(f"megapipe plan '{word}'", tmp_path, PYTHONIOENCODING=encoding)
        assert done.returncode == 1
        assert f"{shown}: there is no such file." in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_lines_are_written_when_they_are_whole_and_again_when_there_is_room() -> None:
    reader, writer = os.pipe()
    failed: list[OSError] = []
    stream = Stream(None, writer, failed.append)
    print("a", end="", file=stream)
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 10)
    print("b\n", end="", file=stream)
    assert os.read(reader, 10) == b"ab\n"
    spare = os.dup(writer)
    os.dup2(os.open("/dev/full", os.O_WRONLY), writer)
    print("lost", file=stream)
    assert [error.errno for error in failed] == [28]
    os.dup2(spare, writer)
    print("c", file=stream)
    assert os.read(reader, 10) == b"c\n"


def test_lines_of_two_threads_stay_whole() -> None:
    reader, writer = os.pipe()
    stream = Stream(None, writer, lambda error: None)
    stream.write("one line, ")
    thread = threading.Thread(target=print, args=("of another thread",), kwargs={"file": stream})
    thread.start()
    thread.join()
    stream.write("in two parts\n")
    assert os.read(reader, 100) == b"of another thread\none line, in two parts\n"


def test_a_line_waits_until_that_of_another_thread_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    stream = Stream(None, writer, lambda error: None)
    second, write = threading.Event(), os.write
    others: list[threading.Thread] = []

    def in_halves(descriptor: int, data: bytes) -> int:
        if not others:  # the system has taken a part of the first line
            others.append(threading.Thread(target=print, args=("second",), kwargs={"file": stream}))
            others[0].start()
            second.wait(0.5)
            return write(descriptor, data[:2])
        if bytes(data) == b"second\n":
            write(descriptor, data)
            second.set()
            return len(data)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", in_halves)
    print("first", file=stream)
    others[0].join()
    assert os.read(reader, 100) == b"first\nsecond\n"


def test_why_output_failed() -> None:
    assert OutputError(BrokenPipeError(32, "Broken pipe")).reader_left
    assert not OutputError(OSError(28, "No space left on device")).reader_left


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_files_do_not_get_the_number_of_a_stream_that_was_closed(closed: int) -> None:
    """What is printed would end up in them."""
    script = (
        "import os, sys\n"
        "from megapipe.tools.console import console\n"
        "with console(lasting=True):\n"
        "    sys.exit(os.open(os.devnull, os.O_RDONLY) < 3)\n"
    )
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(script)} {closed}>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
