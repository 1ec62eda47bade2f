"""`megapipe train` from start to end: what it prints, writes, returns, and how it goes on.

Commands run in forks of a process that has torch imported, which saves three seconds each; one is
started as a user does.
"""

import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from megapipe.checkpoint import storage
from megapipe.checkpoint.load import open_checkpoint
from megapipe.config import dump_config, load_config, parse_config
from megapipe.models.families import FAMILIES
from megapipe.tools.cli import main
from megapipe.train.run_directory import HEADER, RunLock

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["megapipe.tools.cli", "megapipe.train.start"])
NUMBERS = count()

PP2 = "--parallel.pipeline=2"
FP64 = "--train.precision=fp64"


class Command:
    """`megapipe train run.toml ...`, started in `folder`; its output goes to a file."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        environment: dict[str, str] | None = None,
        largest_file: int | None = None,
    ) -> None:
        self.output = folder / f"output-{next(NUMBERS)}"
        words = ["train", "run.toml", *overrides]
        self.process = FORKS.Process(
            target=_command,
            args=(words, str(folder), str(self.output), environment or {}, largest_file),
        )
        self.process.start()

    def signal_after_step(self, run_dir: Path, step: int, number: int) -> None:
        while not (rows := read_rows(run_dir)) or rows[-1]["step"] < step:
            assert self.process.is_alive(), self.output.read_text()
            time.sleep(0.005)
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self, status: int = 0) -> str:
        """What it said, when it ended as it should."""
        self.process.join()
        said = self.output.read_text()
        assert self.process.exitcode == status, said
        assert "Traceback" not in said
        return said


def _command(
    words: list[str],
    folder: str,
    output: str,
    environment: dict[str, str],
    largest_file: int | None,
) -> None:
    from megapipe.tools import cli

    os.chdir(folder)
    os.environ.update(environment)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.exit(cli.main(words))


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def column(run_dir: Path, name: str) -> list[Any]:
    return [row[name] for row in read_rows(run_dir)]


# --- Whole runs ----------------------------------------------------------------------------------


def test_a_whole_run_as_a_user_starts_it(corpus: Path, tmp_path: Path) -> None:
    words = [
        *("--train.run_dir", f"{tmp_path}/run"),
        *("--parallel.tensor=2", PP2, "--parallel.virtual=2"),
        *("--parallel.schedule=interleaved-1f1b", "--parallel.sequence_parallel=true"),
        *("--data.validation_fraction=0.2", "--train.validation_every=3"),
        "--train.validation_batches=2",
    ]
    command = [sys.executable, "-m", "megapipe", "train", str(corpus / "run.toml"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "Layout: 4 ranks = pipeline 2 * data 1 * tensor 2",
        "Schedule: interleaved-1f1b, 4 stages, 4 microbatches of 2 sequences per replica and step",
        "Kernels: torch",
        "Device: cpu, fp32, 1 thread per rank",
    ):
        assert f"\n{line}\n" in done.stdout
    assert re.search(r"\nReady after \d+\.\d s \(imports not counted\)\n", done.stdout)
    assert "\nDone: step 8, 2,048 tokens. Checkpoint: " in done.stdout

    run_dir = tmp_path / "run"
    assert column(run_dir, "step") == list(range(1, 9))
    assert column(run_dir, "tokens") == list(range(256, 2049, 256))
    losses = column(run_dir, "loss")
    assert losses[-1] < losses[0] - 0.3
    validation = column(run_dir, "validation_loss")
    assert [step for step, loss in enumerate(validation, 1) if loss is not None] == [3, 6, 8]
    assert validation[7] < validation[2]

    resolved = parse_config((run_dir / "resolved-config.toml").read_text(), FAMILIES)
    assert resolved.parallel.data == 1
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000008",
    ]
    reader = open_checkpoint(run_dir / "checkpoints" / "step-00000008")
    assert parse_config(reader.read_file("config.toml").decode(), FAMILIES) == resolved
    assert reader.read_file("tokenizer.model") == (corpus / "tokenizer.model").read_bytes()

    again = Command(corpus, *words).finish()
    assert "Nothing to do: the checkpoint is of step 8, and train.steps = 8" in again


def test_losses_and_validation_losses_are_the_same_in_every_layout(
    corpus: Path, tmp_path: Path
) -> None:
    layouts = {
        "one": (),
        "pp2": (PP2, "--parallel.virtual=2", "--parallel.schedule=interleaved-1f1b"),
        "dp2-pp2": (PP2, "--parallel.data=2"),
    }
    validation = (
        *("--data.validation_fraction=0.2", "--train.validation_every=2"),
        *("--train.validation_batches=3", "--train.steps=4", "--data.mask_documents=true"),
    )
    for name, layout in layouts.items():
        Command(corpus, f"--train.run_dir={tmp_path}/{name}", FP64, *validation, *layout).finish()
    for field in ("loss", "grad_norm"):
        expected = column(tmp_path / "one", field)
        assert len(expected) == 4
        for name in layouts:
            assert column(tmp_path / name, field) == pytest.approx(expected, rel=1e-9), name
    expected = column(tmp_path / "one", "validation_loss")
    assert [loss is None for loss in expected] == [True, False, True, False]
    for name in layouts:
        assert column(tmp_path / name, "validation_loss")[1::2] == pytest.approx(
            expected[1::2], rel=1e-9
        )


# --- Stopping and going on -----------------------------------------------------------------------


def test_stopped_by_sigterm_it_goes_on_with_the_very_same_losses(
    corpus: Path, tmp_path: Path
) -> None:
    words = (PP2, "--train.steps=30", "--model.dropout=0.1", "--checkpoint.every=0")
    Command(corpus, *words, f"--train.run_dir={tmp_path}/whole").finish()

    run_dir = tmp_path / "stopped"
    words = (*words, f"--train.run_dir={run_dir}")
    stopped = Command(corpus, *words)
    stopped.signal_after_step(run_dir, 1, signal.SIGTERM)
    said = stopped.finish(128 + signal.SIGTERM)
    step = len(read_rows(run_dir))
    assert 1 <= step < 30
    assert f"Stopped by SIGTERM after step {step} of 30. Checkpoint: {run_dir}" in said
    assert f"To continue:\n    megapipe train run.toml {' '.join(words)}\n" in said

    said = Command(corpus, *words).finish()
    assert f"Resumed from {run_dir}/checkpoints/step-{step:08d} at step {step}." in said
    assert "Changed since" not in said
    for field in ("step", "loss", "grad_norm", "learning_rate", "tokens", "epoch"):
        assert column(run_dir, field) == column(tmp_path / "whole", field), field


def test_ctrl_c_in_one_process(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = Command(corpus, f"--train.run_dir={run_dir}", "--train.steps=1000")
    command.signal_after_step(run_dir, 2, signal.SIGINT)
    said = command.finish(128 + signal.SIGINT)
    step = len(read_rows(run_dir))
    assert f"Stopped by SIGINT after step {step} of 1000" in said
    assert (run_dir / "checkpoints" / f"step-{step:08d}").is_dir()


def test_a_run_begins_from_another(corpus: Path, tmp_path: Path) -> None:
    """From its newest checkpoint, or from its weights alone, which are needed once."""
    first, resumed, loaded = (tmp_path / name for name in "abc")
    Command(corpus, f"--train.run_dir={first}", "--train.steps=2", "--checkpoint.every=1").finish()
    words = (f"--train.run_dir={resumed}", f"--checkpoint.resume={first}", "--train.steps=3")
    said = Command(corpus, *words).finish()
    assert f"Resumed from {first}/checkpoints/step-00000002 at step 2." in said
    assert column(resumed, "step") == [3]

    words = (f"--train.run_dir={loaded}", f"--checkpoint.load_from={first}", "--train.steps=2")
    said = Command(corpus, *words, "--model.qk_norm=true").finish(1)
    assert f'checkpoint.load_from = "{first}" does not fit:' in said
    assert not loaded.exists()
    assert f"Starting from {first}: weights.\n" in Command(corpus, *words).finish()
    first.rename(tmp_path / "gone")
    said = Command(corpus, *words, "--train.steps=3").finish()
    assert f'checkpoint.load_from = "{first}" was for the first start; the run goes on' in said
    assert column(loaded, "step") == [1, 2, 3]


# --- Failing -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_told_once(corpus: Path, tmp_path: Path) -> None:
    words = (PP2, f"--train.run_dir={tmp_path}/run", "--optimizer.learning_rate=1e30")
    said = Command(corpus, *words, "--optimizer.schedule=constant").finish(1)
    assert len(re.findall("^megapipe: loss .*(nan|inf): the step was", said, re.MULTILINE)) == 1
    assert len(column(tmp_path / "run", "loss")) < 8


def test_a_full_disk_is_told_and_at_the_end_an_error(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (PP2, f"--train.run_dir={run_dir}", "--train.steps=4", "--checkpoint.every=2")
    said = Command(corpus, *words, largest_file=100_000).finish(1)
    assert said.count("NOT SAVED at step 2: ") == 1
    assert "Training goes on; the next attempt is after step 4." in said
    error, advice = said.splitlines()[-2:]
    assert re.match(r"megapipe: cannot save checkpoint .*step-00000004: .*file too large", error)
    assert advice.startswith("  The steps after step 0 are not saved. Remove the cause, then start")
    assert column(run_dir, "step") == [1, 2, 3, 4]
    assert list((run_dir / "checkpoints").iterdir()) == []


def test_a_disk_without_room_for_a_checkpoint_stops_the_start(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(corpus)
    words = ["train", "run.toml", f"--train.run_dir={tmp_path}/a/run", "--train.steps=2"]
    monkeypatch.setattr(storage, "free_bytes", lambda directory: 2**20)
    assert main(words) == 1
    assert re.search(
        rf'^megapipe: train\.run_dir = "{tmp_path}/a/run" has no room for a checkpoint: no space '
        r"left on device: needs \d\.\d MiB, 1\.0 MiB free\. Free some space, or choose",
        capfd.readouterr().err,
    )
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(storage, "free_bytes", lambda directory: 2**30)
    assert main(words) == 0
    assert re.search(
        rf"\nCheckpoints: \d\.\d MiB each; 1\.0 GiB free in {tmp_path}/a/run\n",
        capfd.readouterr().out,
    )


def test_nothing_is_written_before_all_is_known_to_fit(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (PP2, f"--train.run_dir={run_dir}", f"--data.sources.0.path={tmp_path}/none.txt")
    said = Command(corpus, *words).finish(1)
    assert said.count("megapipe: data.sources[0].path") == 1
    assert not run_dir.exists()


def test_a_second_start_leaves_the_config_of_a_run_under_way(corpus: Path, tmp_path: Path) -> None:
    with RunLock(tmp_path, print) as lock:
        lock.take()
        text = HEADER + dump_config(load_config(corpus / "run.toml", [], FAMILIES))
        (tmp_path / "resolved-config.toml").write_text(text)
        said = Command(corpus, f"--train.run_dir={tmp_path}").finish(1)
    assert said.count("megapipe: another run is writing to train.run_dir") == 1
    assert (tmp_path / "resolved-config.toml").read_text() == text


@pytest.mark.parametrize("layout", [(), ("--parallel.data=2",), ("--parallel.data=2", PP2)])
def test_text_that_can_not_be_read_costs_no_step_that_was_taken(
    corpus: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """The reader of the last replica meets a bad row; all ranks save, and then the run ends."""
    texts = [f"row {number} " + "some words to read " * 8 for number in range(128)]
    rows = [json.dumps({"text": text}) for text in texts]
    rows[63] = '{"text": '
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = (
        *(f"--data.sources.0.path={tmp_path}/rows.jsonl", "--checkpoint.every=0", *layout),
        *("--train.steps=40", "--model.dropout=0.1", "--optimizer.schedule=constant"),
    )
    run_dir = tmp_path / "run"
    said = Command(corpus, *words, f"--train.run_dir={run_dir}", "--data.max_bad_rows=0").finish(1)
    step = len(read_rows(run_dir))
    assert 1 <= step < 40
    assert f"Saved {run_dir}/checkpoints/step-{step:08d}\n" in said
    assert len(re.findall(r"^megapipe: .*byte 10,826: malformed JSON", said, re.MULTILINE)) == 1

    last = f"--train.steps={step + 3}"
    said = Command(corpus, *words, last, f"--train.run_dir={run_dir}").finish()
    assert f"Resumed from {run_dir}/checkpoints/step-{step:08d} at step {step}." in said
    Command(corpus, *words, last, f"--train.run_dir={tmp_path}/whole").finish()
    for field in ("step", "tokens", "skipped_rows", "loss", "grad_norm"):
        assert column(run_dir, field) == column(tmp_path / "whole", field), field


# --- In a job of torchrun ------------------------------------------------------------------------


def start_job(folder: Path, port: int, *overrides: str, size: int = 2) -> list[Command]:
    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        Command(folder, *overrides, environment={**job, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"})
        for rank in range(size)
    ]


def test_the_processes_of_a_job_are_its_ranks(corpus: Path, tmp_path: Path, port: int) -> None:
    words = (f"--train.run_dir={tmp_path}/run", "--parallel.tensor=2", "--train.steps=3")
    first, second = (command.finish() for command in start_job(corpus, port, *words))
    assert "Layout: 2 ranks = pipeline 1 * data 1 * tensor 2" in first
    assert "Done: step 3" in first
    assert second == ""
    assert column(tmp_path / "run", "step") == [1, 2, 3]


@pytest.mark.parametrize("wrong", ["--data.tokenizer=none.model", "--parallel.tensor=4"])
def test_a_job_tells_what_all_its_ranks_find_once(
    corpus: Path, tmp_path: Path, port: int, wrong: str
) -> None:
    words = (f"--train.run_dir={tmp_path}/run", "--parallel.tensor=2", wrong)
    said = "".join(command.finish(1) for command in start_job(corpus, port, *words))
    assert len(re.findall("^megapipe: ", said, re.MULTILINE)) == 1


def test_metrics_that_only_the_first_rank_can_not_write(
    corpus: Path, tmp_path: Path, port: int
) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    words = (f"--train.run_dir={tmp_path}/run", "--parallel.data=2")
    said = "".join(command.finish(1) for command in start_job(corpus, port, *words))
    (line,) = re.findall("^megapipe: .*", said, re.MULTILINE)
    assert "metrics.jsonl" in line


@pytest.mark.parametrize("gone", [0, 1])
def test_a_job_that_has_lost_a_rank_ends_in_one_line(
    corpus: Path, tmp_path: Path, port: int, gone: int
) -> None:
    words = (f"--train.run_dir={tmp_path}/run", "--parallel.data=2", "--train.steps=100000")
    ranks = start_job(corpus, port, *words)
    ranks[gone].signal_after_step(tmp_path / "run", 2, signal.SIGKILL)
    said = ranks[1 - gone].finish(1)
    (line,) = re.findall("^megapipe: .*", said, re.MULTILINE)
    assert line == said.splitlines()[-1]
    assert line.startswith(f"megapipe: rank {1 - gone} of 2 lost its connection to other ranks (")
    assert line.endswith("the same command goes on from the newest checkpoint.")
