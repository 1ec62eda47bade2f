"""metrics.jsonl through kills, restarts and full disks."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.errors import MegapipeError
from megapipe.train.loggers.jsonl import Kept, MetricsFile, keep_until
from tests.train.samples import sample


def line(step: int) -> bytes:
    return sample(step).to_json().encode() + b"\n"


def steps(path: Path) -> list[int]:
    return [json.loads(text)["step"] for text in path.read_bytes().splitlines()]


@settings(deadline=None)
@given(last=st.integers(0, 12), step=st.integers(0, 12), torn=st.integers(0, 300))
def test_a_start_keeps_whole_lines_up_to_its_step(
    tmp_path_factory: pytest.TempPathFactory, last: int, step: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    part = line(last + 1)[:-1][:torn]
    path.write_bytes(b"".join(line(n) for n in range(1, last + 1)) + part)
    kept = keep_until(path, step)
    assert path.read_bytes() == b"".join(line(n) for n in range(1, min(last, step) + 1))
    assert kept == Kept(last, moved=max(0, last - step) + (part != b""))
    moved = b"".join(line(n) for n in range(step + 1, last + 1)) + (part and part + b"\n")
    aside = path.with_name("metrics-replaced.jsonl")
    assert (aside.read_bytes() if aside.exists() else b"") == moved
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name, aside.name}


def test_what_is_no_line_of_a_step_is_moved(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    junk = [b"\0\0\0\n", b"\n", b"[1]\n", b'{"step": "3"}\n', b"\xff\xfe\n", line(2)]
    path.write_bytes(line(1) + line(2) + b"".join(junk) + line(3))
    said: list[str] = []
    file = MetricsFile(path, 3, said.append)
    file.close(failed=False)
    assert path.read_bytes() == line(1) + line(2) + line(3)
    assert said == [
        f"{path}: moved {len(junk)} lines to metrics-replaced.jsonl: what comes after step 3, or "
        "can't be read."
    ]
    assert (tmp_path / "metrics-replaced.jsonl").read_bytes() == b"".join(junk)


def test_lines_are_moved_behind_those_moved_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for last, step in ((3, 2), (4, 2), (4, 1)):
        path.write_bytes(b"".join(line(n) for n in range(1, last + 1)))
        keep_until(path, step)
    assert steps(tmp_path / "metrics-replaced.jsonl") == [3, 3, 4, 2, 3, 4]


def test_a_linked_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path, target = tmp_path / "metrics.jsonl", tmp_path / "disk" / "metrics.jsonl"
    target.write_bytes(line(1) + line(2))
    path.symlink_to(target)
    keep_until(path, 1)
    assert path.is_symlink()
    assert steps(target) == [1]


def test_a_whole_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2))
    before = path.stat()
    said: list[str] = []
    file = MetricsFile(path, 2, said.append)
    file.log(sample(3))
    file.close(failed=False)
    assert path.stat().st_ino == before.st_ino
    assert steps(path) == [1, 2, 3]
    assert said == []


def test_a_failed_rewrite_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2))

    def refuse(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(MegapipeError, match=r"No space left on device.*train\.run_dir"):
        MetricsFile(path, 1, [].append)
    assert path.read_bytes() == line(1) + line(2)
    assert steps(tmp_path / "metrics-replaced.jsonl") == [2]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    path = tmp_path / "taken" / "metrics.jsonl"
    with pytest.raises(MegapipeError, match=r"metrics\.jsonl: can't be written.*train\.run_dir"):
        MetricsFile(path, 0, [].append)


def test_lines_survive_sigkill(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from megapipe.train.loggers.jsonl import MetricsFile\n"
        "from tests.train.samples import sample\n"
        "file = MetricsFile(Path(sys.argv[1]), 0, print)\n"
        "for step in range(1, 8): file.log(sample(step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", script, str(path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
    assert path.read_bytes() == b"".join(line(step) for step in range(1, 8))


def test_a_full_disk_loses_nothing_once_there_is_room(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: it, too, lets half a line through."""
    path = tmp_path / "metrics.jsonl"
    said: list[str] = []
    file = MetricsFile(path, 0, said.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(line(1)) * 5 // 2, limits[1]))
    try:
        for step in range(1, 6):
            file.log(sample(step))
            assert path.read_bytes() == b"".join(line(n) for n in range(1, min(step, 2) + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.log(sample(6))
    file.close(failed=False)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert len(said) == 2
    assert "Training goes on" in said[0]
    assert "no line is missing" in said[1]


def test_lines_that_never_fit_are_told_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    said: list[str] = []
    file = MetricsFile(path, 0, said.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(line(1)), limits[1]))
    try:
        for step in range(1, 4):
            file.log(sample(step))
        file.close(failed=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(path) == [1]
    assert "lacks 2 lines at its end" in said[-1]
