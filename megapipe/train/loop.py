"""The training loop, on one page. Every rank of the mesh runs it in step with the others."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from megapipe.config import Config
from megapipe.data.distribute import ReplicaFeed
from megapipe.train.checkpoints import Checkpoints, Progress
from megapipe.train.engine import Engine, StepResult
from megapipe.train.learning_rate import learning_rate
from megapipe.train.loggers import Loggers
from megapipe.train.metrics import Metrics
from megapipe.train.signals import StopRequest


@dataclass
class Run:
    """Everything that the loop drives, built and (where there was a checkpoint) restored."""

    config: Config
    engine: Engine
    feed: ReplicaFeed
    validation: ReplicaFeed | None
    checkpoints: Checkpoints
    loggers: Loggers  # speaks on rank 0 only
    stop: StopRequest
    progress: Progress


def train(run: Run) -> Progress:
    """Step until train.steps, or until a rank is asked to stop; the last step is always saved.

    The stop flag travels with the step's own reduction, so all ranks leave after the same step.
    """
    config, progress = run.config, run.progress
    saved = progress.step
    while progress.step < config.train.steps:
        began = time.perf_counter()
        rate = learning_rate(progress.step, config.optimizer, config.train.steps)
        batches = run.feed.next()
        waited = time.perf_counter() - began
        result = run.engine.train_step(batches, rate, stop=run.stop.requested)
        progress = Progress(progress.step + 1, progress.tokens + result.tokens)
        seconds = time.perf_counter() - began

        validation = None
        if _due(progress.step, config.train.validation_every, config.train.steps):
            validation = validation_loss(run)
        run.loggers.log(_metrics(run, progress, result, rate, seconds, waited, validation))
        leaving = result.stop or progress.step == config.train.steps
        if leaving or _due(progress.step, config.checkpoint.every):
            path = run.checkpoints.save(progress, run.feed.state())
            run.loggers.event(f"Saved {path}")
            saved = progress.step
        if result.stop:
            break
    assert saved == progress.step, "the last step is saved"
    return progress
