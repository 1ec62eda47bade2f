"""`megapipe train` behind its command line: start or join the ranks, build the run, drive it.

Everything that a start can find wrong is found before the first step, on all ranks alike, and
before anything is written.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megapipe import __version__
from megapipe.checkpoint.steps import step_name
from megapipe.config import Config, ParallelConfig, check_layout, dump_config
from megapipe.data.distribute import ReplicaFeed
from megapipe.data.tokenizer import load_tokenizer
from megapipe.distributed.launcher import launch_local
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.distributed.rank_group import RankGroup, first_to_report
from megapipe.distributed.rendezvous import (
    Rendezvous,
    from_environment,
    init_process_group,
)
from megapipe.errors import ConfigError, MegapipeError, explained, lost_connection, rank_lost
from megapipe.kernel_choice import choose_kernels
from megapipe.models.build import build_stages
from megapipe.models.families import FAMILIES
from megapipe.models.flops import flops_per_token
from megapipe.models.gpt_config import gpt_model
from megapipe.models.parameters import parameter_count
from megapipe.pipeline.p2p import make_channels
from megapipe.pipeline.picture import require_matplotlib
from megapipe.pipeline.program import stage_placement
from megapipe.precision import keep_sums_wide
from megapipe.tools.cli import render
from megapipe.tools.dry_run import layout_lines
from megapipe.tools.environment import environment_lines
from megapipe.tools.start_report import text_lines
from megapipe.train.auto import check_activation_bytes, settle_program
from megapipe.train.bubble import BubbleMeter
from megapipe.train.checkpoints import Checkpoints, Progress
from megapipe.train.engine import Engine
from megapipe.train.loggers import Loggers
from megapipe.train.loop import Run, train
from megapipe.train.run_directory import RunLock, plan_start, write_config
from megapipe.train.signals import StopRequest
from megapipe.train.timeline import TimelineWriter


def start(config: Config, config_path: str, overrides: Sequence[str]) -> int:
    """Train in the job that this process belongs to, or in local ranks that it starts.

    Returns the exit status: 0 when train.steps are done; 128 + the signal's number when one asked
    to stop and the checkpoint was saved (143 for SIGTERM, 130 for SIGINT).
    """
    command = shlex.join(["megapipe", "train", config_path, *overrides])
    began = time.perf_counter()
    rendezvous = from_environment()
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline * (parallel.data or 1)
    if rendezvous is None:
        rank_main = partial(run_rank, check_layout(config, ranks), command, began)
        return launch_local(rank_main, ranks, partial(describe_rank, parallel))
    try:
        config = check_layout(config, rendezvous.world_size)
    except ConfigError:
        if rendezvous.rank == 0:
            raise  # every rank finds the same, and one of them tells it
        time.sleep(2)  # the first to leave has the others ended, and that shall not be this one
        sys.exit(1)
    return run_rank(config, command, began, rendezvous)


def describe_rank(parallel: ParallelConfig, rank: int) -> str:
    """`rank 3 (pipeline 1, data 0, tensor 1)`, as `Mesh.describe` has it."""
    tensor, data = parallel.tensor, parallel.data or 1
    pipeline = rank // (tensor * data)
    return (
        f"rank {rank} (pipeline {pipeline}, data {rank // tensor % data}, tensor {rank % tensor})"
    )


def run_rank(config: Config, command: str, began: float, rendezvous: Rendezvous) -> int:
    """One rank's life. In a job, what goes wrong on many ranks alike is told by one of them."""
    voice = Voice(rendezvous.rank)
    timeout, first = config.train.stop_timeout_seconds, rendezvous.rank == 0
    with StopRequest(voice.say, timeout=timeout, first=first) as stop:
        return _run_rank(config, command, began, rendezvous, voice, stop)


def _run_rank(
    config: Config,
    command: str,
    began: float,
    rendezvous: Rendezvous,
    voice: "Voice",
    stop: StopRequest,
) -> int:
    device = choose_device(config.train.device, rendezvous)
    store = init_process_group(rendezvous, device)
    try:
        status = _train(config, command, began, device, voice, stop)
    except Exception as error:
        if store is None or rendezvous.address is None:
            raise  # for the command line or the launcher to tell
        told = _told_in_job(error, rendezvous)
        if told is None:
            raise
        if first_to_report(store, str(told)):
            print(render(told), file=sys.stderr, flush=True)
        time.sleep(1)  # till all have asked the store, which this process may serve
        sys.exit(1)
    if store is not None:
        dist.destroy_process_group()
    return status


def _told_in_job(error: Exception, rendezvous: Rendezvous) -> MegapipeError | None:
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
                "GPUs. Start one rank for each GPU (tensor * pipeline * data of [parallel] in "
                'all), or set train.device = "cpu".'
            ]
        )
    torch.cuda.set_device(index)
    keep_sums_wide()
    return torch.device("cuda", index)


@dataclass
class Voice:
    """Lines for people. Rank 0 speaks; a warning of another rank goes to stderr under its name."""

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
        """Speak above a progress bar while there is one."""
        before, self.line = self.line, line
        try:
            yield
        finally:
            self.line = before


def _train(
    config: Config,
    command: str,
    began: float,
    device: torch.device,
    voice: Voice,
    stop: StopRequest,
) -> int:
    parallel = config.parallel
    assert parallel.data is not None
    voice.say(f"megapipe {__version__}")
    if config.logging.timeline is not None:
        require_matplotlib(f'logging.timeline = "{config.logging.timeline}"')
    mesh = build_mesh(
        pipeline=parallel.pipeline, data=parallel.data, tensor=parallel.tensor, device=device
    )
    with RunLock(Path(config.train.run_dir), voice.say, mesh.world.rank_group) as lock:
        return _start_or_resume(config, command, began, mesh, lock, voice, stop)


def _start_or_resume(
    config: Config,
    command: str,
    began: float,
    mesh: Mesh,
    lock: RunLock,
    voice: Voice,
    stop: StopRequest,
) -> int:
    ranks = mesh.world.rank_group
    plan = plan_start(config, FAMILIES, ranks)
    introduction = [*_introduction(config, mesh.device), *environment_lines(config, os.environ)]
    for line in [*introduction, *plan.notes]:
        voice.say(line)
    channels = make_channels(mesh)
    config = settle_program(config, mesh, channels, build_stages, lock, voice.say)
    feed, validation = _open_feeds(config, mesh, voice)
    readers = [one.reader for one in (feed, validation) if one is not None and one.reader]
    for line in ranks.from_first(lambda: text_lines(config, readers)):
        voice.say(line)
    engine = Engine(config, mesh, build_stages, channels)
    check_activation_bytes(config, engine)
    checkpoints = Checkpoints(
        _with_resume(config, plan.resume), mesh, engine, _kept_files(config, ranks), voice.say
    )
    progress, data_state = checkpoints.restore()
    if data_state is not None:
        feed.load(data_state)
    steps = config.train.steps
    if progress.step >= steps:
        voice.say(
            f"Nothing to do: the checkpoint is of step {progress.step}, and train.steps = {steps}. "
            "Raise train.steps to go on."
        )
        return 0
    voice.say(checkpoints.check_space())
    lock.take()
    write_config(config, ranks)
    with _open_loggers(config, ranks, progress.step) as loggers, voice.through(loggers.event):
        voice.say(f"Ready after {time.perf_counter() - began:.1f} s (imports not counted)")
        flops = flops_per_token(gpt_model(config), config.train.sequence_length)
        bubble = BubbleMeter(mesh, engine.program, engine.recorder)
        run = Run(
            config, engine, feed, validation, checkpoints, loggers, stop, progress, flops, bubble
        )
        run.timeline = _timeline(config, engine, loggers, progress.step)
        try:
            progress = train(run)
        finally:
            stop.end()
    for reader in (feed, validation):
        if reader is not None:
            reader.close()
    return _farewell(progress, config, stop, command, voice)


def _open_feeds(config: Config, mesh: Mesh, voice: Voice) -> tuple[ReplicaFeed, ReplicaFeed | None]:
    """The text to train on, and the text for the validation loss if there is to be one."""
    pipeline = mesh.pipeline
    placement = stage_placement(config)
    open_feed = partial(
        ReplicaFeed,
        config,
        mesh,
        hosts_first=placement[0] == pipeline.rank,
        hosts_last=placement[-1] == pipeline.rank,
        say=voice.warn,
    )
    feed = open_feed()
    validates = config.train.validation_every > 0
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


def _with_resume(config: Config, resume: str) -> Config:
    checkpoint = config.checkpoint.model_copy(update={"resume": resume})
    return config.model_copy(update={"checkpoint": checkpoint})


def _kept_files(config: Config, ranks: RankGroup) -> dict[str, bytes]:
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


def _introduction(config: Config, device: torch.device) -> Iterator[str]:
    train = config.train
    yield from layout_lines(config)
    yield f"Parameters: {parameter_count(gpt_model(config)):,}"
    yield f"Kernels: {choose_kernels(config, device)}"
    if device.type == "cuda":
        yield f"Device: {torch.cuda.get_device_name(device)}, {train.precision}"
    else:
        threads = torch.get_num_threads()
        yield f"Device: cpu, {train.precision}, {threads} thread{'s'[: threads > 1]} per rank"
        if train.precision == "bf16":
            yield 'CPUs are slow at bf16: train.precision = "fp32" is several times as fast here.'


def _farewell(
    progress: Progress, config: Config, stop: StopRequest, command: str, voice: Voice
) -> int:
    """Say how the run ended and where its checkpoint is; returns the exit status."""
    steps = config.train.steps
    path = Path(config.train.run_dir) / "checkpoints" / step_name(progress.step)
    if progress.step >= steps:
        voice.say(f"Done: step {progress.step}, {progress.tokens:,} tokens. Checkpoint: {path}")
        return 0
    # Only the ranks that a signal reached know which it was.
    number = stop.signal or signal.SIGTERM
    voice.say(
        f"Stopped by {number.name} after step {progress.step} of {steps}. Checkpoint: {path}\n"
        f"To continue:\n    {command}"
    )
    return 128 + number
