"""All sinks together: only rank 0 speaks, and none of them stops a run."""

import json
import sys
from pathlib import Path

import pytest

from megapipe.errors import MegapipeError
from megapipe.train.loggers import Loggers
from megapipe.train.metrics import SERIES, Metrics
from tests.train.samples import TOTAL, config, open_loggers, sample


def test_other_ranks_write_and_say_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    everything = config('wandb = "offline"\ntensorboard = true')
    with Loggers(everything, run_dir=tmp_path, rank0=False, start=0, total_steps=TOTAL) as loggers:
        loggers.log(sample(1))
        loggers.event("hello")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_off_means_the_metrics_file_alone(tmp_path: Path) -> None:
    said: list[str] = []
    run_dir = tmp_path / "runs" / "x"
    with open_loggers(run_dir, config(), said) as loggers:
        for step in (1, 2):
            loggers.log(sample(step))
        loggers.event("Saved it")
    loggers.close()  # a second time changes nothing
    assert [entry.name for entry in run_dir.iterdir()] == ["metrics.jsonl"]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [Metrics(**json.loads(line)) for line in lines] == [sample(1), sample(2)]
    assert said[0] == f"Run directory: {run_dir}, with a line for each step in metrics.jsonl"
    assert said[-1] == "Saved it"


def test_a_sink_that_fails_is_off_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def broken(self: object, metrics: Metrics) -> None:
        raise RuntimeError("no more ink")

    monkeypatch.setattr("megapipe.train.loggers.tensorboard.TensorBoard.log", broken)
    with open_loggers(tmp_path, config('wandb = "off"\ntensorboard = true'), said) as loggers:
        for step in range(1, 4):
            loggers.log(sample(step))
    assert sum("no more ink" in line for line in said) == 1
    assert sum(line.startswith("step ") for line in said) == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_console_that_is_gone_does_not_stop_the_run(tmp_path: Path) -> None:
    def say(text: str) -> None:
        raise BrokenPipeError

    with Loggers(
        config(), run_dir=tmp_path, rank0=True, start=0, total_steps=TOTAL, say=say
    ) as loggers:
        for step in (1, 2):
            loggers.log(sample(step))
        loggers.event("nobody hears this")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


# --- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    charts = config('wandb = "off"\ntensorboard = true')
    with open_loggers(tmp_path, charts, []) as loggers:
        for step in range(1, 8):
            loggers.log(sample(step))
    with open_loggers(tmp_path, charts, [], start=5) as loggers:  # killed after 7, resumed from 5
        for step in range(6, 11):
            loggers.log(sample(step))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    by_source = {f"sources/{name}/{key}" for name in ("web", "code") for key in ("tokens", "share")}
    tables = {"sources", "validation_sources"}
    plain = SERIES.keys() - {"perf/mfu"} - tables
    assert set(read.Tags()["scalars"]) == plain | by_source | {"sources/web/loss"}
    losses = [(event.step, event.value) for event in read.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(sample(step).loss)) for step in range(1, 11)]
    assert [event.step for event in read.Scalars("train/validation_loss")] == [5, 10]
    assert read.Scalars("mem/peak_gib")[0].value == 1.5


def test_tensorboard_missing_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MegapipeError) as caught:
        open_loggers(tmp_path / "run", config('wandb = "off"\ntensorboard = true'), [])
    assert "logging.tensorboard = true" in str(caught.value)
    assert "pip install 'megapipe[tensorboard]'" in str(caught.value)
    assert not (tmp_path / "run").exists()
