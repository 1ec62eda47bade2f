"""What a run reports: metrics.jsonl, the console, Weights & Biases, TensorBoard. Rank 0 speaks.

metrics.jsonl always exists and is the truth; the others show it. None of them can stop a run once
it has begun: one that fails is closed, and that is said once.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from megapipe.config import Config
from megapipe.train.loggers.console import open_console
from megapipe.train.loggers.jsonl import MetricsFile
from megapipe.train.loggers.tensorboard import TensorBoard
from megapipe.train.loggers.wandb_environment import wandb_choice
from megapipe.train.loggers.weights_and_biases import WeightsAndBiases
from megapipe.train.metrics import Metrics


class Sink(Protocol):
    """The one place to which each step is reported."""

    def log(self, metrics: Metrics) -> None: ...

    def close(self, failed: bool) -> None: ...


class Loggers:
    """All sinks of a run that goes on after step `start`; on ranks other than 0 there are none.

    Raises MegapipeError where metrics.jsonl can't be written or TensorBoard is missing. `say` takes
    lines for people in place of standard output.
    """

    def __init__(
        self,
        config: Config,
        *,
        run_dir: Path,
        rank0: bool,
        start: int,
        total_steps: int,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._sinks: dict[str, Sink] = {}
        self._say: Callable[[str], None] = _nobody
        if not rank0:
            return
        console = open_console(start, total_steps, config.logging.every, say)
        self._say = console.event
        tensorboard = TensorBoard(run_dir, start) if config.logging.tensorboard else None
        file = MetricsFile(run_dir / "metrics.jsonl", start, self.event)
        self._sinks = {"metrics.jsonl": file, "The console": console}
        self.event(f"Run directory: {run_dir}, with a line for each step in metrics.jsonl")
        if tensorboard:
            self._sinks["TensorBoard"] = tensorboard
        choice = wandb_choice(config.logging, run_dir, os.environ)
        for line in choice.trouble.values():
            self.event(line)
        if choice.mode != "off":
            try:
                self._sinks["W&B"] = WeightsAndBiases(
                    config, choice, run_dir, start, file, self.event
                )
            except OSError as error:
                self.event(f"W&B could not be started ({error}); the run goes on without it.")

    def log(self, metrics: Metrics) -> None:
        """Tell everyone about a step; never raises, and waits for no network."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.log(metrics)
            except Exception as error:
                self._failed(name, error)

    def event(self, text: str) -> None:
        """A line for people, above the progress bar where there is one; never raises."""
        with suppress(Exception):  # the terminal is gone, say
            self._say(text)

    def picture(self, path: Path, step: int) -> None:
        """A picture of `step`, for those who show pictures; never raises."""
        sink = self._sinks.get("W&B")
        if isinstance(sink, WeightsAndBiases):
            try:
                sink.picture(path, step)
            except Exception as error:
                self._failed("W&B", error)

    def close(self, failed: bool = False) -> None:
        """Flush and close everything; `failed` says that training ended with an error."""
        while self._sinks:
            name = next(iter(self._sinks))
            try:
                self._sinks.pop(name).close(failed)
            except Exception as error:
                self.event(f"{name} could not be closed: {error}")

    def _failed(self, name: str, error: Exception) -> None:
        sink = self._sinks.pop(name)
        with suppress(Exception):
            sink.close(failed=True)
        self.event(f"{name} failed ({error}) and is off from here on; the run goes on without it.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)


def _nobody(text: str) -> None:
    """Ranks other than 0 keep quiet."""
