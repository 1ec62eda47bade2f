"""A run that is killed again and again logs the very losses of a run that never was.

Ranks are ended by SIGKILL at random moments, the same command goes on each time. Run as a program
it does the long version: `python -m tests.test_kill_and_resume --steps 60 --kills 10`.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.corpus import write_config, write_text, write_tokenizer

COMMAND = [sys.executable, "-m", "megapipe", "train"]
KILLED_LAYOUT = (
    "--parallel.tensor=2",
    "--parallel.pipeline=2",
    "--parallel.virtual=2",
    "--parallel.schedule=interleaved-1f1b",
    "--parallel.sequence_parallel=true",
    "--train.precision=fp64",
    "--model.dropout=0.1",
    "--checkpoint.every=3",
    "--checkpoint.keep=1000",
)
PP4 = (
    "--parallel.tensor=1",
    "--parallel.pipeline=4",
    "--parallel.virtual=1",
    "--parallel.schedule=1f1b",
    "--parallel.sequence_parallel=false",
)
DP2_TP2 = (
    "--parallel.tensor=2",
    "--parallel.pipeline=1",
    "--parallel.data=2",
    "--parallel.virtual=1",
    "--parallel.schedule=1f1b",
)
TIMEOUT = 240


def start(config: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    words = [*COMMAND, str(config), "--train.run_dir", str(run_dir), *overrides]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=config.parent
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return output


def losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "each step once"
    return {row["step"]: row["loss"] for row in rows}


def kill_a_rank(
    process: subprocess.Popen[str], run_dir: Path, moments: random.Random, most_steps: int
) -> None:
    """SIGKILL to a random rank after a random number of new steps, and a moment more."""
    metrics = run_dir / "metrics.jsonl"
    before = count_lines(metrics)
    wanted = moments.randint(0, most_steps)
    ranks: list[psutil.Process] = []
    while len(ranks) < 4 or count_lines(metrics) < before + wanted:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
        ranks = psutil.Process(process.pid).children()
        before = min(before, count_lines(metrics))  # a resume drops what was not saved
    time.sleep(moments.uniform(0, 0.2 if wanted else 2.0))
    moments.choice(ranks).kill()
    began = time.monotonic()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0, output
    assert "SIGKILL" in output, output
    assert "Traceback" not in output, output
    assert time.monotonic() - began < 10, "the other ranks end soon"
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != "zombie"]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_and_resume(folder: Path, *, steps: int, kills: int, seed: int) -> dict[str, float]:
    """The whole story; returns figures for the reader."""
    write_text(folder)
    write_tokenizer(folder)
    config = write_config(folder, steps=steps)
    finish(start(config, folder / "undisturbed", *KILLED_LAYOUT))
    expected = losses(folder / "undisturbed")
    assert len(expected) == steps

    moments, run_dir = random.Random(seed), folder / "killed"
    for _ in range(kills):
        process = start(config, run_dir, *KILLED_LAYOUT)
        kill_a_rank(process, run_dir, moments, steps // (kills + 1))
    finish(start(config, run_dir, *KILLED_LAYOUT))
    assert losses(run_dir) == expected, "bitwise"

    middle = steps // 2 // 3 * 3
    checkpoint = folder / "undisturbed" / "checkpoints" / f"step-{middle:08d}"
    worst = 0.0
    for number, layout in enumerate((PP4, DP2_TP2)):
        other = folder / f"other-{number}"
        shutil.copytree(checkpoint, other / "checkpoints" / checkpoint.name)
        output = finish(start(config, other, *KILLED_LAYOUT, *layout))
        assert f"step {middle}" in output, "it goes on from there"
        rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(middle + 1, steps + 1))
        errors = [abs(row["loss"] / expected[row["step"]] - 1) for row in rows]
        worst = max(worst, *errors)
    assert worst <= 1e-9
    return {"kills": kills, "steps": steps, "worst_relative_error_other_layouts": worst}


@pytest.mark.timeout(400)
def test_killed_runs_log_the_losses_of_an_undisturbed_one(tmp_path: Path) -> None:
    figures = kill_and_resume(tmp_path, steps=12, kills=2, seed=0)
    assert figures["kills"] == 2


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill_and_resume(Path(folder), **vars(options))))


if __name__ == "__main__":
    main(sys.argv[1:])
