"""`megapipe train` behind its command line: start or join the ranks, build the run, drive it.

Everything that a start can find wrong is found before the first step, on all ranks alike, and
before anything is written.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megapipe import __version__
from megapipe.checkpoint.steps import step_name
from megapipe.config import Config, dump_config
from megapipe.config.axes import WORLD_SIZE
from megapipe.conversion.exportable import check_exports
from megapipe.data.distribute import ReplicaFeed
from megapipe.data.feed import State
from megapipe.data.tokenizer import load_tokenizer
from megapipe.distributed.launcher import launch_local
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.distributed.rank_group import RankGroup, first_to_report
from megapipe.distributed.rendezvous import (
    Rendezvous,
    from_environment,
    init_process_group,
)
from megapipe.errors import (
    ConfigError,
    DataError,
    MegapipeError,
    explained,
    lost_connection,
    rank_lost,
    render,
)
from megapipe.kernel_choice import choose_kernels
from megapipe.layout.axes import Axes
from megapipe.layout.estimates import flops_per_token
from megapipe.layout.family import ModelFamily
from megapipe.layout.layout import Layout
from megapipe.layout.world import resolve_axes, with_axes
from megapipe.pipeline.p2p import make_channels
from megapipe.pipeline.picture import require_matplotlib
from megapipe.plan.dry_run import layout_lines
from megapipe.precision import keep_sums_wide
from megapipe.train.auto import check_activation_bytes, settle_layout
from megapipe.train.bubble import BubbleMeter
from megapipe.train.checkpoints import Checkpoints, Progress
from megapipe.train.engine import Engine
from megapipe.train.environment import environment_lines
from megapipe.train.exports import Exports
from megapipe.train.load_from import LoadFrom
from megapipe.train.loggers import Loggers
from megapipe.train.loop import Run, train
from megapipe.train.run_directory import RunLock, plan_start, write_config
from megapipe.train.signals import StopRequest
from megapipe.train.start_report import text_lines
from megapipe.train.timeline import TimelineWriter


@dataclass(frozen=True)
class Start:
    """What a user has asked for, the same for all ranks.

    `config` names the size of every axis; `families` are those that there are; `command` is how to
    ask for the same again.
    """

    config: Config
    axes: Axes
    families: Mapping[str, ModelFamily]
    command: str
    began: float

    @property
    def family(self) -> ModelFamily:
        """The family of the model that is trained."""
        return self.families[self.config.model.family]


def start(
    config: Config,
    families: Mapping[str, ModelFamily],
    config_path: str,
    overrides: Sequence[str],
) -> int:
    """Train in the job that this process belongs to, or in local ranks that it starts.

    Returns the exit status: 0 when train.steps are done; 128 + the signal's number when one asked
    to stop and the checkpoint was saved (143 for SIGTERM, 130 for SIGINT).
    """
    command = shlex.join(["megapipe", "train", config_path, *overrides])
    began = time.perf_counter()
    rendezvous = from_environment()
    if rendezvous is None:
        axes = resolve_axes(config)
        asked = Start(with_axes(config, axes), axes, families, command, began)
        return launch_local(partial(run_rank, asked), axes.world_size, axes.describe)
    try:
        axes = resolve_axes(config, rendezvous.world_size)
    except ConfigError:
        if rendezvous.rank == 0:
            raise  # every rank finds the same, and one of them reports it
        time.sleep(2)  # the first to leave has the others ended, and that shall not be this one
        sys.exit(1)
    asked = Start(with_axes(config, axes), axes, families, command, began)
    return run_rank(asked, rendezvous)


def run_rank(start: Start, rendezvous: Rendezvous) -> int:
    """One rank's life. In a job, what goes wrong on many ranks alike is reported by one of them."""
    lines = RankLines(rendezvous.rank)
    timeout, first = start.config.train.stop_timeout_seconds, rendezvous.rank == 0
    with StopRequest(lines.say, timeout=timeout, first=first) as stop:
        return _run_rank(start, rendezvous, lines, stop)


def _run_rank(start: Start, rendezvous: Rendezvous, lines: "RankLines", stop: StopRequest) -> int:
    device = choose_device(start.config.train.device, rendezvous)
    store = init_process_group(rendezvous, device)
    try:
        status = _train(start, device, lines, stop)
    except Exception as error:
        if store is None or rendezvous.address is None:
            raise  # for the command line or the launcher to report
        found = _reported_in_job(error, rendezvous)
        if found is None:
            raise
        if first_to_report(store, str(found)):
            print(render(found), file=sys.stderr, flush=True)
        time.sleep(1)  # till all have asked the store, which this process may serve
        sys.exit(1)
    if store is not None:
        dist.destroy_process_group()
    return status


def _reported_in_job(error: Exception, rendezvous: Rendezvous) -> MegapipeError | None:
    """The error as the user sees it; None for a fault of the program."""
    said = None if isinstance(error, MegapipeError) else lost_connection(error)
    if said is None:
        return explained(error)
    return rank_lost(f"rank {rendezvous.rank} of {rendezvous.world_size}", said)


def choose_device(wanted: str, rendezvous: Rendezvous) -> torch.device:
    """What train.device means for this rank. Raises ConfigError where there is no GPU for it."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError(
            [
                f'train.device = "{wanted}", and torch {torch.__version__} finds no GPU here. Set '
                'train.device = "cpu", or see why `nvidia-smi` or `rocm-smi` shows none.'
            ]
        )
    index = 0 if rendezvous.own_gpu and count == 1 else rendezvous.local_rank
    if index >= count:
        raise ConfigError(
            [
                f"{rendezvous.local_size} ranks were started on this machine, and it has {count} "
                f"GPUs. Start one rank for each GPU ({WORLD_SIZE} of [parallel] in "
                'all), or set train.device = "cpu".'
            ]
        )
    torch.cuda.set_device(index)
    keep_sums_wide()
    return torch.device("cuda", index)


@dataclass
class RankLines:
    """Lines for people. Rank 0 prints them; a warning of another rank goes to stderr under its
    name."""

    rank: int
    line: Callable[[str], None] = field(default=partial(print, flush=True))

    def say(self, text: str) -> None:
        if self.rank == 0:
            self.line(text)

    def warn(self, text: str) -> None:
        if self.rank == 0:
            self.line(text)
        else:
            print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def through(self, line: Callable[[str], None]) -> Iterator[None]:
        """Print above a progress bar while there is one."""
        before, self.line = self.line, line
        try:
            yield
        finally:
            self.line = before


def _train(start: Start, device: torch.device, lines: RankLines, stop: StopRequest) -> int:
    config = start.config
    lines.say(f"megapipe {__version__}")
    if config.logging.timeline is not None:
        require_matplotlib(f'logging.timeline = "{config.logging.timeline}"')
    mesh = build_mesh(start.axes, device)
    with RunLock(Path(config.train.run_dir), lines.say, mesh.world.rank_group) as lock:
        return _start_or_resume(start, mesh, lock, lines, stop)


def _start_or_resume(
    start: Start, mesh: Mesh, lock: RunLock, lines: RankLines, stop: StopRequest
) -> int:
    ranks = mesh.world.rank_group
    plan = plan_start(start.config, start.families, ranks)
    loads = LoadFrom(start.config, start.families, ranks) if plan.loads else None
    exported = ranks.from_first(lambda: check_exports(start.config, start.families))
    notes = [*plan.notes, *(loads.notes if loads else []), *exported]
    for line in [*_introduction(start, mesh.device), *notes]:
        lines.say(line)
    channels = make_channels(mesh)
    layout = settle_layout(start.config, start.family, mesh, channels, lock, lines.say)
    config = layout.config
    feed, validation = _open_feeds(layout, mesh, lines)
    readers = [one.reader for one in (feed, validation) if one is not None and one.reader]
    for line in ranks.from_first(lambda: text_lines(config, readers)):
        lines.say(line)
    exports = Exports(config, start.family, ranks, lines.say)
    engine = Engine(layout, mesh, channels)
    check_activation_bytes(engine)
    checkpoints = Checkpoints(engine, plan.resume, kept_files(config, ranks), lines.say)
    progress, data_state = checkpoints.restore()
    if loads is not None:
        progress, data_state = loads.restore(engine, lines.say)
        checkpoints.origin = loads.origin
    if data_state is not None:
        _go_on_in_text(feed, data_state, loaded=loads is not None)
    steps, finished = config.train.steps, progress.step >= config.train.steps
    if finished:
        lines.say(
            f"Nothing to do: the checkpoint is of step {progress.step}, and train.steps = {steps}. "
            "Raise train.steps to go on."
        )
        if exports.missed(progress.step) is None:
            return 0
    else:
        lines.say(checkpoints.check_space())
    lock.take()
    exports.catch_up(progress.step)
    if finished:
        return 0
    write_config(config, ranks)
    checkpoints.begin(progress, feed.state())
    with _open_loggers(config, ranks, progress.step) as loggers, lines.through(loggers.event):
        lines.say(f"Ready after {time.perf_counter() - start.began:.1f} s (imports not counted)")
        flops = flops_per_token(layout)
        bubble = BubbleMeter(mesh, engine.program, engine.recorder)
        run = Run(
            config,
            engine,
            feed,
            validation,
            checkpoints,
            loggers,
            stop,
            progress,
            flops,
            bubble,
            exports,
        )
        run.timeline = _timeline(config, engine, loggers, progress.step)
        try:
            progress = train(run)
        finally:
            stop.end()
    for reader in (feed, validation):
        if reader is not None:
            reader.close()
    return _farewell(progress, config, stop, start.command, lines)


def _go_on_in_text(feed: ReplicaFeed, state: State, *, loaded: bool) -> None:
    """Go on behind `state`. Raises DataError where it is of other data; of a model that is `loaded`
    the position need not be taken."""
    try:
        feed.load(state)
    except DataError as error:
        if loaded:
            error.add_note('Or leave "data" out of checkpoint.load_state.')
        raise


def _open_feeds(
    layout: Layout, mesh: Mesh, lines: RankLines
) -> tuple[ReplicaFeed, ReplicaFeed | None]:
    """The text to train on, and the text for the validation loss if there is to be one."""
    open_feed = partial(ReplicaFeed, layout, mesh, say=lines.warn)
    feed = open_feed()
    validates = layout.config.train.validation_every > 0
    return feed, open_feed(validation=True, other=feed) if validates else None


def _timeline(
    config: Config, engine: Engine, loggers: Loggers, start: int
) -> TimelineWriter | None:
    """What writes logging.timeline in a run that goes on after step `start`."""
    asked = config.logging.timeline
    if asked is None:
        return None
    writer = TimelineWriter(
        asked,
        mesh=engine.mesh,
        program=engine.program,
        recorder=engine.recorder,
        schedule=config.parallel.schedule,
        run_dir=Path(config.train.run_dir),
        say=loggers.event,
        show=loggers.picture,
    )
    if writer.steps[-1] <= start:
        loggers.event(
            f'logging.timeline = "{asked}" is not after step {start}, from which the run goes on: '
            "no timeline will be written."
        )
        return None
    return writer


def kept_files(config: Config, ranks: RankGroup) -> dict[str, bytes]:
    """What each checkpoint holds besides tensors, as it is now: config and tokenizer. Collective:
    the first rank reads them, and where it can't, all raise."""

    def read() -> dict[str, bytes]:
        tokenizer = load_tokenizer(config.data.tokenizer)
        contents = {name: path.read_bytes() for name, path in tokenizer.files.items()}
        return {"config.toml": dump_config(config).encode(), **contents}

    return ranks.on_first(read) or {}


def _open_loggers(config: Config, ranks: RankGroup, start: int) -> Loggers:
    """The loggers of a run that goes on after step `start`. Collective: those of the first rank
    write, and where they can't be opened, all raise."""
    loggers = partial(
        Loggers,
        config,
        run_dir=Path(config.train.run_dir),
        start=start,
        total_steps=config.train.steps,
    )
    return ranks.on_first(lambda: loggers(rank0=True)) or loggers(rank0=False)


def _introduction(start: Start, device: torch.device) -> Iterator[str]:
    config, train = start.config, start.config.train
    yield from layout_lines(config, start.axes)
    yield f"Parameters: {sum(spec.size for spec in start.family.parameters(config.model)):,}"
    yield f"Kernels: {choose_kernels(config, device)}"
    if device.type == "cuda":
        yield f"Device: {torch.cuda.get_device_name(device)}, {train.precision}"
    else:
        threads = torch.get_num_threads()
        yield f"Device: cpu, {train.precision}, {threads} thread{'s'[: threads > 1]} per rank"
        if train.precision == "bf16":
            yield 'CPUs are slow at bf16: train.precision = "fp32" is several times as fast here.'
    yield from environment_lines(config, os.environ)


def _farewell(
    progress: Progress, config: Config, stop: StopRequest, command: str, lines: RankLines
) -> int:
    """Say how the run ended and where its checkpoint is; returns the exit status."""
    steps = config.train.steps
    path = Path(config.train.run_dir) / "checkpoints" / step_name(progress.step)
    if progress.step >= steps:
        lines.say(f"Done: step {progress.step}, {progress.tokens:,} tokens. Checkpoint: {path}")
        return 0
    # Only the ranks that a signal reached know which it was.
    number = stop.signal or signal.SIGTERM
    lines.say(
        f"Stopped by {number.name} after step {progress.step} of {steps}. Checkpoint: {path}\n"
        f"To continue:\n    {command}"
    )
    return 128 + number
