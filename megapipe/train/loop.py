"""The training loop, on one page. Every rank of the mesh runs it in step with the others.

Text that can't be read, on any replica, ends the run between two steps: the step for which it was
needed is taken by no rank, the steps before it are saved, and every rank raises the error. An error
inside a step leaves weights that nobody can vouch for: it ends the run without a save.
"""

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from megapipe.config import Config
from megapipe.data.distribute import BATCH_HASH, COUNTS, ReplicaFeed, joined_hash
from megapipe.data.rows import too_many_bad_rows
from megapipe.errors import CheckpointError
from megapipe.optim.learning_rate import learning_rate
from megapipe.step_sums import Given, StepPart, StepSums, Totals
from megapipe.train.bubble import BubbleMeter
from megapipe.train.checkpoints import Checkpoints, Progress
from megapipe.train.engine import Engine, StepResult
from megapipe.train.exports import Exports
from megapipe.train.loggers import Loggers
from megapipe.train.metrics import Metrics, device_peak_flops, peak_memory_bytes
from megapipe.train.signals import StopRequest
from megapipe.train.source_metrics import (
    metrics_by_source,
    source_names,
    training_by_source,
    validation_source_names,
)
from megapipe.train.timeline import TimelineWriter


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
    flops_per_token: float
    bubble: BubbleMeter
    exports: Exports
    timeline: TimelineWriter | None = None
    first_step: int = 0
    """The step from which this start goes on."""
    saved_step: int = 0
    """The step of the newest checkpoint that holds this run."""


class StopFlag(StepPart):
    """Lets all ranks know whether one was asked to stop, so that they leave after the same step."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def register(self, sums: StepSums) -> None:
        sums.register("stop")

    def given(self) -> dict[str, Given]:
        return {"stop": float(self._stop.requested)}


def train(run: Run) -> Progress:
    """Step until train.steps, or until a rank is asked to stop; the last step is always saved."""
    config, progress = run.config, run.progress
    run.first_step = run.saved_step = progress.step
    for part in (StopFlag(run.stop), run.feed, run.bubble):
        run.engine.join(part)
    run.stop.begin()
    while progress.step < config.train.steps:
        began = time.perf_counter()
        rate = learning_rate(progress.step, config.optimizer, config.train.steps)
        batches = run.feed.next()
        waited = time.perf_counter() - began
        result = run.engine.train_step(batches, rate, ready=not run.feed.failed)
        if not result.taken:
            run.feed.take_back()
            end_with(run, progress, run.feed.shared_failure())
        progress = Progress(progress.step + 1, progress.tokens + result.tokens)
        seconds = time.perf_counter() - began
        run.stop.step_ended(seconds)
        if progress.step == run.first_step + 1:  # which loads kernels, and connects ranks
            run.engine.wait_at_most(timedelta(seconds=config.train.collective_timeout_seconds))

        validation = failure = None
        if _due(progress.step, config.train.validation_every, last=config.train.steps):
            validation, failure = validation_totals(run)
        run.loggers.log(_metrics(run, progress, result, rate, seconds, waited, validation))
        if run.engine.mesh.batch.size > 1:  # one reader alone stops by itself, and names the row
            skipped = int(result.totals["skipped_rows"])
            failure = failure or too_many_bad_rows(skipped, config.data.max_bad_rows)
        if failure is not None:
            end_with(run, progress, failure)
        if run.timeline is not None:
            run.timeline.after(progress.step)
        stopping = result.totals["stop"] > 0  # some rank was asked to
        leaving = stopping or progress.step == config.train.steps
        exporting = _due(progress.step, config.checkpoint.export_every)
        if leaving or exporting or _due(progress.step, config.checkpoint.every):
            saved = save(run, progress, last=leaving)
            if exporting and saved is not None:
                export(run, saved, progress.step)
            elif exporting:
                run.loggers.event(
                    f"NOT EXPORTED at step {progress.step}: its checkpoint was not saved."
                )
        if stopping:
            break
    return progress


def save(run: Run, progress: Progress, *, last: bool) -> Path | None:
    """Write a checkpoint; returns its path. One that can't be written (a full disk) is reported,
    and the next one is tried when it is due: older checkpoints are whole. The last one has to
    succeed, or this raises CheckpointError."""
    try:
        with run.stop.saving(), run.engine.patient():
            path = run.checkpoints.save(progress, run.feed.state())
    except CheckpointError as error:
        if last:
            error.add_note(
                f"The steps after step {run.saved_step} are not saved. Remove the cause, then "
                "start the same command again."
            )
            raise
        run.loggers.event(
            f"NOT SAVED at step {progress.step}: {str(error).removesuffix('.')}. Training goes on; "
            f"the next attempt is after step {_next_save(run.config, progress.step)}."
        )
        return None
    run.saved_step = progress.step
    run.loggers.event(f"Saved {path}")
    return path


def _next_save(config: Config, step: int) -> int:
    """The step after which the next checkpoint is due."""
    periods = (config.checkpoint.every, config.checkpoint.export_every)
    due = [(step // every + 1) * every for every in periods if every > 0]
    return min([*due, config.train.steps])


def export(run: Run, checkpoint: Path, step: int) -> None:
    """Export the checkpoint of a step. One that can't be written is reported."""
    with run.stop.saving(), run.engine.patient():
        said = run.exports.write(checkpoint, step)
    run.loggers.event(said)


def end_with(run: Run, progress: Progress, error: Exception) -> NoReturn:
    """Save what was trained since the last checkpoint, then raise `error`; on all ranks alike."""
    if progress.step > run.saved_step:
        try:
            save(run, progress, last=True)
        except CheckpointError as second:
            error.add_note(f"The steps after step {run.saved_step} are lost: {second}")
    raise error


def validation_totals(run: Run) -> tuple[Totals | None, Exception | None]:
    """Losses and tokens over the first train.validation_batches batches of validation text, or why
    they can't be read; on all ranks alike."""
    assert run.validation is not None
    run.validation.restart()
    found: Totals | None = None
    for _ in range(run.config.train.validation_batches):
        batches = run.validation.next()
        result = run.engine.validation_loss(batches, ready=not run.validation.failed)
        run.stop.alive()
        if result is None:
            return None, run.validation.shared_failure()
        found = result if found is None else found + result
    return found, None


def _due(step: int, every: int, *, last: int | None = None) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _metrics(
    run: Run,
    progress: Progress,
    result: StepResult,
    rate: float,
    seconds: float,
    waited: float,
    validation: Totals | None,
) -> Metrics:
    mesh, config = run.engine.mesh, run.config
    speed = result.tokens / seconds
    peak = device_peak_flops(mesh.device, config.train.precision)
    validated = validation_sources = None
    if validation is not None:
        validated = validation["loss"] / validation["tokens"]
        validation_sources = metrics_by_source(validation_source_names(config), validation)
    return Metrics(
        step=progress.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate,
        tokens=progress.tokens,
        tokens_per_second=speed,
        step_seconds=seconds,
        mfu=speed * run.flops_per_token / (peak * mesh.world_size) if peak else None,
        data_wait_seconds=waited,
        memory_bytes=peak_memory_bytes(mesh.device),
        epoch=int(result.totals["epoch"]),
        **{name: int(result.totals[name]) for name in COUNTS},
        validation_loss=validated,
        bubble=run.bubble.measured(result.totals),
        bubble_planned=run.bubble.planned(result.totals),
        sources=training_by_source(source_names(config), result.totals),
        batch_hash=joined_hash(result.totals.all(BATCH_HASH)),
        validation_sources=validation_sources,
    )
