"""Weights & Biases: one curve whatever happens to the run, and a run that does not notice W&B."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megapipe.train.loggers import follow, weights_and_biases
from tests.train.samples import TOTAL, config, open_loggers, sample
from tests.train.wandb_file import OfflineRun, offline_runs
from tests.train.wandb_server import wandb_server

KEY = "0123456789abcdef" * 2 + "01234567"
SECRET = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _account(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's: no login and no settings of the user's, no server but the test's own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", SECRET)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no failure."""
    monkeypatch.setattr(weights_and_biases, "INIT_SECONDS", 30.0)
    monkeypatch.setattr(weights_and_biases, "UPLOAD_SECONDS", 60.0)
    monkeypatch.setattr(weights_and_biases, "CLOSE_SECONDS", 120.0)


def run(run_dir: Path, steps: range, mode: str, said: list[str], extra: str = "") -> None:
    """Train from before the first of `steps` to the last."""
    settings = config(f'wandb = "{mode}"\nwandb_project = "atlas"', extra)
    with open_loggers(run_dir, settings, said, start=steps.start - 1) as loggers:
        for step in steps:
            loggers.log(sample(step))


def logged(runs: list[OfflineRun]) -> list[int]:
    return [step for one in runs for step in one.rows]


def about_wandb(said: list[str]) -> list[str]:
    return [line for line in said if "W&B" in line]


def eventually(condition: Callable[[], bool], within: float = 90.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_is_written_offline(tmp_path: Path) -> None:
    """Then resumed, and online without a key: one curve, in which no step is there twice."""
    said: list[str] = []
    run_dir = tmp_path / "my run"
    run(run_dir, range(1, 8), "offline", said)
    how = f"To upload: cd '{run_dir}' && wandb sync"
    assert about_wandb(said) == [f"W&B, offline: {run_dir}/wandb. {how}"]
    said.clear()
    run(run_dir, range(6, 11), "online", said)  # resumed from the checkpoint of step 5
    told = about_wandb(said)
    assert len(told) == 2
    assert "W&B online failed (No API key" in told[0]
    assert told[0].endswith(how)
    assert told[1] == "W&B has this run up to step 7 already and goes on from there."

    first, second = offline_runs(run_dir)
    assert first.id == second.id == (run_dir / "wandb-id").read_text()
    assert logged([first]) == [1, 2, 3, 4, 5, 6, 7]
    assert logged([second]) == [8, 9, 10]
    assert (first.project, first.name) == ("atlas", "my run")
    whole = config('wandb = "offline"\nwandb_project = "atlas"').model_dump(mode="json")
    assert {key: first.config[key] for key in first.config if key != "_wandb"} == whole
    assert first.x_axes["*"] == "data/tokens"
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.rows[5] == {
        "train/loss": 4.5,
        "train/grad_norm": 1.5,
        "train/learning_rate": 3e-4,
        "train/validation_loss": 4.25,
        "perf/tokens_per_second": 12345.6,
        "perf/step_seconds": 0.25,
        "perf/data_wait_seconds": 0.01,
        "perf/bubble": 0.4,
        "perf/bubble_planned": 0.375,
        "mem/peak_gib": 1.5,
        "data/tokens": 5000,
        "data/epoch": 0,
        "data/skipped_rows": 2,
        "data/skipped_bytes": 100,
        "data/unreadable_bytes": 30,
        "data/empty_rows": 7,
        "data/excluded_rows": 4,
        "sources/web/tokens": 750,
        "sources/web/share": 0.75,
        "sources/web/loss": 4.0,
        "sources/code/tokens": 0,
        "sources/code/share": 0.0,
    }
    assert "train/validation_loss" not in first.rows[4]
    assert not holds(run_dir, SECRET)
    assert list(Path.home().rglob("*")) == [], "nothing is written outside the run directory"


def test_a_picture_goes_along_with_a_later_row(tmp_path: Path) -> None:
    said: list[str] = []
    picture, broken = tmp_path / "timeline.png", tmp_path / "broken.png"
    Image.new("RGB", (8, 4)).save(picture)
    broken.write_bytes(b"no picture")
    with open_loggers(tmp_path, config('wandb = "offline"'), said) as loggers:
        loggers.log(sample(1))
        eventually(lambda: [list(one.rows) for one in offline_runs(tmp_path)] == [[1]])
        loggers.picture(picture, 1)
        loggers.picture(broken, 1)
        loggers.log(sample(2))
        loggers.log(sample(3))
    (found,) = offline_runs(tmp_path)
    assert list(found.rows) == [1, 2, 3]
    shown: list[Any] = [row for row in found.rows.values() if "timeline/_type" in row]
    assert [(row["timeline/caption"], row["timeline/width"]) for row in shown] == [("step 1", 8)]
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media/images/*.png")
    assert media.read_bytes() == picture.read_bytes()
    assert len([line for line in said if line.startswith("W&B does not show broken.png: ")]) == 1


def holds(directory: Path, text: str) -> list[Path]:
    """Files in which the text is found."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


def test_killed_then_begun_anew_then_failed(tmp_path: Path) -> None:
    """A killed run still gets its last steps across, a failed one does not wait until it has.

    Training that begins anew is another run in W&B, and has all its steps there.
    """
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.train.samples import *\n"
        "loggers = open_loggers(Path(sys.argv[1]), config('wandb = \"offline\"'), [])\n"
        "for step in range(1, 5): loggers.log(sample(step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False)

    anew = config('wandb = "offline"', extra='[checkpoint]\nresume = "never"')
    loggers = open_loggers(tmp_path, anew, [])
    loggers.log(sample(1))
    with pytest.raises(ZeroDivisionError), loggers:
        raise ZeroDivisionError
    assert offline_runs(tmp_path)[1:] == [], "it did not wait"

    eventually(lambda: [one.exit_code for one in offline_runs(tmp_path)] == [1, 1])
    killed, failed = sorted(offline_runs(tmp_path), key=lambda one: -len(one.rows))
    assert killed.id != failed.id
    assert logged([killed]) == [1, 2, 3, 4]
    assert logged([failed]) == [1]


def test_unreachable_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start does not wait; W&B writes offline instead; no key is written anywhere."""
    monkeypatch.setattr(weights_and_biases, "INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    began = time.monotonic()
    loggers = open_loggers(tmp_path, config('wandb = "online"'), said)
    loggers.log(replace(sample(1), loss=math.nan))
    assert time.monotonic() - began < 5.0, "the start waits for nothing"
    assert about_wandb(said) == []
    loggers.close()
    assert time.monotonic() - began < 60.0
    (told,) = about_wandb(said)
    assert "W&B online failed" in told
    assert f"cd {tmp_path} && wandb sync" in told
    (found,) = offline_runs(tmp_path)
    assert logged([found]) == [1]
    assert "train/loss" not in found.rows[1]
    assert list(tmp_path.glob("wandb/run-*")) == []
    assert not holds(tmp_path, KEY)


def test_a_variable_that_w_and_b_can_not_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing goes to another server than the one that was meant; the run has its file."""
    monkeypatch.setenv("WANDB_BASE_URL", "wandb.example")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    monkeypatch.setenv("WANDB_SERVICE", "of another process")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    run(tmp_path, range(1, 4), "online", said)
    first, second, third = about_wandb(said)
    assert first.startswith('W&B can\'t use WANDB_BASE_URL = "wandb.example" (base_url ')
    assert second.startswith('W&B can\'t use WANDB_INIT_TIMEOUT = "soon" (init_timeout ')
    assert third.startswith("W&B, offline: ")
    assert logged(offline_runs(tmp_path)) == [1, 2, 3]


def test_a_wrong_variable_is_one_line_without_a_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "me:secret@wandb.example")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "two\nlines")
    assert {"WANDB_BASE_URL", "WANDB_INIT_TIMEOUT"} <= set(follow.wrong_variables())
    first, second = capsys.readouterr().out.splitlines()
    assert first == "W&B can't use WANDB_BASE_URL and writes offline without it. Correct it."
    assert second.startswith('W&B can\'t use WANDB_INIT_TIMEOUT = "two\\nlines" (init_timeout ')


def test_the_environment_decides_where_the_config_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(tmp_path / "none", range(1, 3), "auto", said)
    assert about_wandb(said) == []
    assert not (tmp_path / "none" / "wandb-id").exists()
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    run(tmp_path / "some", range(1, 3), "auto", said)
    assert about_wandb(said)[0].startswith('WANDB_MODE = "nonsense" is not online, offline or ')
    assert logged(offline_runs(tmp_path / "some")) == [1, 2]


def test_a_server_that_never_answers_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_and_biases, "CLOSE_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as hole:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        began = time.monotonic()
        run(tmp_path, range(1, 3), "online", said)
    assert time.monotonic() - began < 15.0
    assert about_wandb(said) == ["W&B did not end within 1 s and was ended."]


def test_online_is_one_curve_and_holes_are_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First without W&B, which lacks steps 1-4 then; then online, killed, and online again."""
    run(tmp_path, range(1, 5), "off", [])
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    with wandb_server() as (address, runs):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        run(tmp_path, range(5, 9), "online", said)
        run(tmp_path, range(7, 11), "online", said)
    ((id_, served),) = runs.items()
    assert id_ == (tmp_path / "wandb-id").read_text()
    assert [row["_step"] for row in served.history] == list(range(1, 11))
    assert [row["train/loss"] for row in served.history] == [sample(n).loss for n in range(1, 11)]
    assert served.config["train"]["steps"] == 100
    assert served.exit_code == 0
    assert [line for line in said if line.startswith("W&B: ")] == [
        f"W&B: {address}/e/p/runs/{id_}"
    ] * 2


def test_a_dead_process_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    with open_loggers(tmp_path, config('wandb = "offline"'), said) as loggers:
        eventually(lambda: followers() != [])
        (follower,) = followers()
        os.kill(int(follower), signal.SIGKILL)
        eventually(lambda: state(follower) == "Z")
        for step in range(1, TOTAL + 1):
            loggers.log(sample(step))
    assert about_wandb(said) == ["W&B's process died (status -9); the run goes on without it."]
    assert any(line.startswith(f"step {TOTAL}/{TOTAL}") for line in said)


def followers() -> list[str]:
    """Process ids of this process's children that follow a metrics.jsonl."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in children if b"follow.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def state(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
