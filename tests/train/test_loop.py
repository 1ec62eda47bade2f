"""The loop alone: when it saves, validates, stops, and what it does when a save fails."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megapipe.config import Config, load_config
from megapipe.data.distribute import BATCH_HASH, SOURCE_BYTES, SOURCE_EPOCHS
from megapipe.distributed.mesh import Mesh
from megapipe.errors import CheckpointError, DataError
from megapipe.models.families import FAMILIES
from megapipe.optim.learning_rate import learning_rate
from megapipe.step_sums import StepPart, Totals
from megapipe.train.checkpoints import Progress
from megapipe.train.engine import StepResult
from megapipe.train.loop import Run, train
from megapipe.train.metrics import Metrics
from megapipe.train.source_metrics import SOURCE_LOSSES, SOURCE_TOKENS
from tests.config.examples import write


class Feed:
    """Gives the number of its next step; from `fails_at` on, a stand-in."""

    def __init__(self, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.taken = 0
        self.fails_at = fails_at
        self.error = error or DataError("row 7: malformed")

    def next(self) -> int:
        self.taken += 1
        return self.taken

    @property
    def failed(self) -> bool:
        return self.taken == self.fails_at

    def take_back(self) -> None:
        self.taken -= 1

    def shared_failure(self) -> Exception:
        return self.error

    def slowest(self, totals: object) -> None:
        return None

    def given(self) -> dict[str, float]:
        counts = {"skipped_rows": 3, "skipped_bytes": 40, "unreadable_bytes": 50, "empty_rows": 6}
        return {**counts, "excluded_rows": 7, "epoch": 1}

    def restart(self) -> None:
        self.taken = 0

    def state(self) -> dict[str, Any]:
        return {"step": self.taken}


class Engine:
    """Loses 1 / batch, on 100 tokens a step; stops when asked, or by another rank's request."""

    mesh = Mesh.single(torch.device("cpu"))

    def __init__(self, stops_at: int | None = None, fails_at: int | None = None) -> None:
        self.rates: list[float] = []
        self.parts: list[Any] = []
        self.waits: list[float] = []
        self.stops_at = stops_at
        self.fails_at = fails_at

    def join(self, part: Any) -> None:
        self.parts.append(part)

    def train_step(self, batches: int, rate: float, *, ready: bool) -> StepResult:
        if batches == self.fails_at:
            raise RuntimeError("a kernel failed")
        self.rates.append(rate)
        given = {name: value for part in self.parts for name, value in part.given().items()}
        if batches == self.stops_at:
            given["stop"] = 2.0
        return StepResult(
            loss=1 / batches,
            grad_norm=0.5,
            clip=1.0,
            tokens=100,
            totals=Totals(
                {name: [value] for name, value in given.items()} | of_source(100 / batches, 100)
            ),
            taken=ready,
        )

    def wait_at_most(self, timeout: timedelta) -> None:
        self.waits.append(timeout.total_seconds())

    @contextmanager
    def patient(self) -> Iterator[None]:
        self.waits.append(math.inf)
        yield
        self.waits.append(-math.inf)

    def validation_loss(self, batches: int, *, ready: bool) -> Totals | None:
        return Totals(of_source(60.0 * batches, 10 + batches)) if ready else None


def of_source(loss: float, tokens: int) -> dict[str, list[float]]:
    """Sums of a batch in which all tokens are those of one source, four bytes of text each."""
    return {
        "loss": [loss],
        "tokens": [tokens],
        SOURCE_LOSSES: [loss],
        SOURCE_TOKENS: [tokens],
        SOURCE_BYTES: [4 * tokens],
        SOURCE_EPOCHS: [1.25],
        BATCH_HASH: [0xCDEF, 0x89AB, 0x14567, 0x0122],
    }


class Stop:
    """Remembers what it hears."""

    def __init__(self, requested: bool = False) -> None:
        self.requested = requested
        self.heard: list[str] = []

    def begin(self) -> None:
        self.heard.append("begin")

    def step_ended(self, seconds: float) -> None:
        assert seconds > 0
        self.heard.append("step")

    def alive(self) -> None:
        self.heard.append("alive")

    @contextmanager
    def saving(self) -> Iterator[None]:
        self.heard.append("save")
        yield
        self.heard.append("saved")


class Bubble(StepPart):
    """As of a GPipe program, on every step."""

    def measured(self, totals: Totals) -> float:
        return 0.25

    def planned(self, totals: Totals) -> float:
        return 0.2


class Checkpoints:
    """Remembers what was saved; fails at the steps given."""

    def __init__(self, fails_at: tuple[int, ...] = ()) -> None:
        self.saved: list[tuple[Progress, dict[str, Any]]] = []
        self.fails_at = fails_at

    def save(self, progress: Progress, data_state: dict[str, Any]) -> Path:
        if progress.step in self.fails_at:
            raise CheckpointError("no space left on device")
        self.saved.append((progress, data_state))
        return Path(f"step-{progress.step}")

    @property
    def steps(self) -> list[int]:
        return [progress.step for progress, _ in self.saved]


class Loggers:
    def __init__(self) -> None:
        self.rows: list[Metrics] = []
        self.events: list[str] = []

    def log(self, metrics: Metrics) -> None:
        self.rows.append(metrics)

    def event(self, text: str) -> None:
        self.events.append(text)


class Exports:
    """Notes what is to be exported."""

    def __init__(self) -> None:
        self.written: list[tuple[Path, int]] = []

    def write(self, checkpoint: Path, step: int) -> str:
        self.written.append((checkpoint, step))
        return f"Exported {step}"


def make_config(folder: Path, *overrides: str) -> Config:
    words = ("--train.steps=7", "--checkpoint.every=3", "--data.validation_fraction=0.1")
    return load_config(write(folder), [*words, *overrides], FAMILIES)


def make_run(config: Config, **parts: Any) -> Any:
    """A Run of stand-ins, as Any so that tests reach what is theirs."""
    defaults = {
        "engine": Engine(),
        "feed": Feed(),
        "validation": Feed(),
        "checkpoints": Checkpoints(),
        "loggers": Loggers(),
        "stop": Stop(),
        "progress": Progress(),
        "flops_per_token": 6.0,
        "bubble": Bubble(),
        "exports": Exports(),
    }
    return Run(config, **(defaults | parts))


def test_steps_to_the_end_and_saves_when_due_and_last(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run = make_run(config)
    assert train(run) == Progress(7, 700)
    assert run.checkpoints.steps == [3, 6, 7]
    assert run.checkpoints.saved[1] == (Progress(6, 600), {"step": 6})
    assert run.engine.rates == [learning_rate(t, config.optimizer, 7) for t in range(7)]
    assert run.loggers.events == ["Saved step-3", "Saved step-6", "Saved step-7"]


def test_exports_what_it_saves_for_that(tmp_path: Path) -> None:
    run = make_run(
        make_config(tmp_path, "--checkpoint.export_every=2"), checkpoints=Checkpoints((4,))
    )
    train(run)
    assert run.checkpoints.steps == [2, 3, 6, 7]
    assert run.exports.written == [(Path("step-2"), 2), (Path("step-6"), 6)]
    assert run.loggers.events[:2] == ["Saved step-2", "Exported 2"]
    assert "NOT SAVED at step 4" in run.loggers.events[3]
    assert "the next attempt is after step 6." in run.loggers.events[3]
    assert run.loggers.events[4] == "NOT EXPORTED at step 4: its checkpoint was not saved."


def test_tells_each_step(tmp_path: Path) -> None:
    run = make_run(make_config(tmp_path))
    train(run)
    assert [row.step for row in run.loggers.rows] == [1, 2, 3, 4, 5, 6, 7]
    row = run.loggers.rows[1]
    assert (row.loss, row.grad_norm, row.tokens) == (0.5, 0.5, 200)
    assert row.learning_rate == run.engine.rates[1]
    assert row.tokens_per_second == pytest.approx(100 / row.step_seconds)
    assert 0 <= row.data_wait_seconds <= row.step_seconds
    assert (row.epoch, row.mfu, row.validation_loss) == (1, None, None)
    assert (row.skipped_rows, row.skipped_bytes, row.unreadable_bytes) == (3, 40, 50)
    assert (row.empty_rows, row.excluded_rows) == (6, 7)
    assert (row.bubble, row.bubble_planned) == (0.25, 0.2)
    assert row.batch_hash == "0123456789abcdef"
    bits = 0.5 / math.log(2) / 4
    measured = {"tokens": 100, "share": 1.0, "loss": 0.5, "epochs": 1.25, "bits_per_byte": bits}
    assert row.sources == {"a": pytest.approx(measured)}
    assert row.validation_sources is None
    assert row.memory_bytes > 2**20


def test_mfu_counts_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(make_config(tmp_path))
    monkeypatch.setattr("megapipe.train.loop.device_peak_flops", lambda device, precision: 1e3)
    train(run)
    row = run.loggers.rows[0]
    assert row.mfu == pytest.approx(6.0 * row.tokens_per_second / 1e3)


def test_goes_on_from_where_it_was(tmp_path: Path) -> None:
    run = make_run(make_config(tmp_path), progress=Progress(5, 1000))
    assert train(run) == Progress(7, 1200)
    assert run.checkpoints.steps == [6, 7]
    done = make_run(make_config(tmp_path), progress=Progress(7, 700))
    assert train(done) == Progress(7, 700)
    assert done.checkpoints.steps == [], "nothing to do, nothing to save"


def test_every_0_saves_at_the_end_only(tmp_path: Path) -> None:
    run = make_run(make_config(tmp_path, "--checkpoint.every=0"))
    train(run)
    assert run.checkpoints.steps == [7]


def test_a_request_on_any_rank_saves_and_leaves(tmp_path: Path) -> None:
    own = make_run(make_config(tmp_path), stop=Stop(requested=True))
    assert train(own) == Progress(1, 100)
    assert own.checkpoints.steps == [1]
    elsewhere = make_run(make_config(tmp_path), engine=Engine(stops_at=4))
    assert train(elsewhere) == Progress(4, 400)
    assert elsewhere.checkpoints.steps == [3, 4]


def test_validates_when_due_and_last_on_the_same_batches(tmp_path: Path) -> None:
    words = ("--train.validation_every=2", "--train.validation_batches=3")
    run = make_run(make_config(tmp_path, *words))
    train(run)
    expected = 60.0 * (1 + 2 + 3) / (11 + 12 + 13)
    losses = {row.step: row.validation_loss for row in run.loggers.rows}
    assert losses == {step: expected if step in (2, 4, 6, 7) else None for step in range(1, 8)}
    assert run.loggers.rows[1].validation_sources == {
        "a": {"tokens": 36, "share": 1.0, "loss": expected}
    }


def test_a_save_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    run = make_run(make_config(tmp_path), checkpoints=Checkpoints(fails_at=(3,)))
    assert train(run) == Progress(7, 700)
    assert run.checkpoints.steps == [6, 7]
    assert run.loggers.events[0] == (
        "NOT SAVED at step 3: no space left on device. Training goes on; the next attempt is "
        "after step 6."
    )


def test_the_last_save_has_to_succeed(tmp_path: Path) -> None:
    run = make_run(make_config(tmp_path), checkpoints=Checkpoints(fails_at=(6, 7)))
    with pytest.raises(CheckpointError, match="no space left"):
        train(run)
    assert run.checkpoints.steps == [3]
    asked = make_run(
        make_config(tmp_path), engine=Engine(stops_at=2), checkpoints=Checkpoints(fails_at=(2,))
    )
    with pytest.raises(CheckpointError, match="no space left"):
        train(asked)


def test_text_that_can_not_be_read_costs_no_step(tmp_path: Path) -> None:
    for error in (DataError("row 7: malformed"), RuntimeError("a bug in the reader")):
        run = make_run(make_config(tmp_path), feed=Feed(fails_at=6, error=error))
        with pytest.raises(type(error), match=str(error)):
            train(run)
        assert run.checkpoints.steps == [3, 5]
        assert run.checkpoints.saved[-1] == (Progress(5, 500), {"step": 5}), "not the step it lacks"
        assert [row.step for row in run.loggers.rows] == [1, 2, 3, 4, 5]


def test_nothing_new_is_nothing_to_save(tmp_path: Path) -> None:
    for fails_at, start, saved in ((1, 0, []), (4, 0, [3]), (1, 6, [])):
        run = make_run(make_config(tmp_path), feed=Feed(fails_at), progress=Progress(start))
        with pytest.raises(DataError):
            train(run)
        assert run.checkpoints.steps == saved


def test_validation_text_that_can_not_be_read_costs_no_step(tmp_path: Path) -> None:
    config = make_config(tmp_path, "--train.validation_every=2", "--train.validation_batches=3")
    run = make_run(config, validation=Feed(fails_at=2))
    with pytest.raises(DataError, match="row 7"):
        train(run)
    assert run.checkpoints.steps == [2]
    assert [(row.step, row.validation_loss) for row in run.loggers.rows] == [(1, None), (2, None)]


def test_too_many_bad_rows_of_several_readers_cost_no_step(tmp_path: Path) -> None:
    run = make_run(make_config(tmp_path, "--data.max_bad_rows=2"))
    run.engine.mesh = SimpleNamespace(
        batch=SimpleNamespace(size=2), device=torch.device("cpu"), world_size=2
    )
    with pytest.raises(DataError, match="3 bad rows were met"):
        train(run)
    assert run.checkpoints.steps == [1]


def test_an_error_inside_a_step_saves_nothing(tmp_path: Path) -> None:
    run = make_run(make_config(tmp_path), engine=Engine(fails_at=6))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(run)
    assert run.checkpoints.steps == [3]


def test_a_save_that_fails_then_is_told_with_the_error(tmp_path: Path) -> None:
    run = make_run(
        make_config(tmp_path), feed=Feed(fails_at=6), checkpoints=Checkpoints(fails_at=(5,))
    )
    with pytest.raises(DataError) as caught:
        train(run)
    assert caught.value.report == (
        "row 7: malformed\n  The steps after step 3 are lost: no space left on device"
    )


def test_a_request_to_stop_hears_how_the_run_gets_on(tmp_path: Path) -> None:
    words = ("--train.steps=2", "--train.validation_every=2", "--train.validation_batches=2")
    run = make_run(make_config(tmp_path, *words))
    train(run)
    assert run.stop.heard == ["begin", "step", "step", "alive", "alive", "save", "saved"]


def test_ranks_are_patient_in_the_first_step_and_in_saves(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, "--train.collective_timeout_seconds=45", "--checkpoint.every=0", "--train.steps=3"
    )
    run = make_run(config, progress=Progress(1, 100))
    train(run)
    assert run.engine.waits == [45, math.inf, -math.inf]
