"""parallel.schedule = "auto" at the start of a run: measure, search, and keep what was chosen.

The program lies in the run directory and belongs to the run: a resume takes it again, so that the
order of all additions stays. It is searched for anew, and said to be, where there is none yet or
the run goes on in another layout, number of microbatches or limit, which it can't serve. Rank 0
searches, with the times that all ranks have measured; every rank then reads the same file.
"""

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from hashlib import sha256
from pathlib import Path

import torch

from megapipe.config import Config
from megapipe.config.save import write_text
from megapipe.data.synthetic import synthetic_microbatch
from megapipe.data_parallel.buffer import layout_buffers
from megapipe.distributed.mesh import Mesh
from megapipe.distributed.rank_group import RankGroup
from megapipe.errors import MegapipeError, ScheduleError
from megapipe.kernel_choice import choose_kernels
from megapipe.layout.family import ModelFamily
from megapipe.layout.layout import Layout, resolve
from megapipe.layout.program import PROGRAM_FILE, byte_limit, looped_config, microbatch_limit
from megapipe.microbatch import MicroBatch
from megapipe.pipeline.costs import read_costs
from megapipe.pipeline.measure import activation_bytes, measure_latency, measure_stages
from megapipe.pipeline.p2p import Channels
from megapipe.pipeline.schedule import Costs, to_csv
from megapipe.pipeline.schedule.fitting import check_limit
from megapipe.pipeline.schedule.limit import Limit
from megapipe.pipeline.schedule.search import search
from megapipe.pipeline.schedule.search.reason import search_report, seconds, summary
from megapipe.pipeline.schedule.stored import UnfitProgramError
from megapipe.precision import PRECISIONS
from megapipe.stage import build_stages
from megapipe.train.engine import Engine
from megapipe.train.run_directory import RunLock

REPLACED_FILE = "schedule-replaced.csv"
"""In the run directory: the program that was there before, where it did not fit any more."""
REASON_FILE = "schedule.txt"
"""In the run directory: what was measured and tried, and why the program was chosen."""
SHARED_WITHIN = 30.0
"""Seconds in which a file that rank 0 wrote must be there for all."""

Say = Callable[[str], None]


def settle_layout(
    config: Config,
    family: ModelFamily,
    mesh: Mesh,
    channels: Channels,
    lock: RunLock,
    say: Say,
) -> Layout:
    """The layout of a run on the ranks of the mesh, with its program.

    For schedule auto that is the one of the run directory if it fits, or else a new one, which is
    the same for all ranks and stays this run's: the directory is locked. Collective. Raises
    MegapipeError for a limit that nothing keeps, for a damaged file, and for a run directory that
    another run writes to or that ranks don't share.
    """
    if config.parallel.schedule != "auto":
        return resolve(config, mesh.axes, family)
    lock.take()
    ranks = mesh.world.rank_group
    file = Path(config.train.run_dir) / PROGRAM_FILE
    content = _shared_content(file, ranks)
    if content is not None:
        try:
            settled = resolve(config, mesh.axes, family, content)
        except UnfitProgramError as error:
            say(
                f"The program of an earlier start is kept as {REPLACED_FILE}, and won't do: {error}"
            )
        else:
            say(
                f"Program: that of {file}, from an earlier start of this run; without the file one "
                "is searched for anew"
            )
            return settled
    measured = resolve(looped_config(config), mesh.axes, family)
    costs, sizes = _costs(config, measured, mesh, channels)
    lines = ranks.from_first(lambda: _choose(config, measured, costs, sizes, file))
    for line in lines:
        say(line)
    return resolve(config, mesh.axes, family, _shared_content(file, ranks))


def check_activation_bytes(engine: Engine) -> None:
    """Compare the program with a parallel.activation_limit in bytes. Collective.

    Raises ScheduleError, on all ranks, where a rank would hold more.
    """
    layout, config = engine.layout, engine.config
    most = byte_limit(config)
    if most is None:
        return
    own = _own_bytes(layout, engine.mesh, engine.stages)
    gathered = engine.mesh.world.rank_group.all_gather(own)
    limit = Limit.in_bytes(most, _by_stage(layout, gathered))
    name = config.parallel.schedule
    try:
        check_limit(name, layout.program.compute, limit, virtual=layout.virtual)
    except ScheduleError as error:
        if name != "auto":
            raise
        file = Path(config.train.run_dir) / PROGRAM_FILE
        raise ScheduleError(f"{error} To search for one that fits, delete {file}.") from error


# --- Measuring -----------------------------------------------------------------------------------


def _costs(
    config: Config, layout: Layout, mesh: Mesh, channels: Channels
) -> tuple[Costs, list[float]]:
    """What stages take, and bytes of activations of each, the same on all ranks.

    The stages are built for this alone, placed looped as in `layout` (what a stage takes does not
    depend on where it is) and given up again before the run builds its own.
    """
    ranks = mesh.world.rank_group
    from_file = config.parallel.stage_costs
    if from_file is not None:
        stages, size = len(layout.stages), layout.boundary_bytes
        costs = ranks.from_first(lambda: astuple(read_costs(from_file, stages, size)))
        if byte_limit(config) is None:
            return Costs(*costs), []
    own = _measure(layout, mesh, channels)
    gc.collect()  # the run builds its stages where these were
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    gathered = ranks.all_gather(own)
    sizes = _by_stage(layout, [rank["bytes"] for rank in gathered])
    if from_file is not None:
        return Costs(*costs), sizes
    forward, backward_input, backward_weight = (
        _by_stage(layout, [rank[kind] for rank in gathered]) for kind in ("F", "I", "W")
    )
    latency = max(rank["latency"] for rank in gathered)
    return Costs(forward, backward_input, backward_weight, latency), sizes


def _measure(layout: Layout, mesh: Mesh, channels: Channels) -> dict[str, object]:
    """This rank's measurements, as JSON: by kind, what each stage takes under its number."""
    stages = build_stages(layout, mesh, choose_kernels(layout.config, mesh.device))
    layout_buffers(layout, stages.values())
    hidden, batch = _hidden(layout, mesh), _batch(layout, mesh)
    found: dict[str, object] = {"bytes": _own_bytes(layout, mesh, stages)}
    mesh.world.rank_group.all_gather(None)  # all ranks begin at the same time
    times = measure_stages(stages, batch, hidden)
    for index, kind in enumerate(("F", "I", "W")):
        found[kind] = {str(stage): astuple(taken)[index] for stage, taken in times.items()}
    found["latency"] = measure_latency(channels, mesh.pipeline.size, hidden)
    return found


def _own_bytes(layout: Layout, mesh: Mesh, stages: dict[int, torch.nn.Module]) -> dict[str, float]:
    sizes = activation_bytes(stages, _batch(layout, mesh), _hidden(layout, mesh))
    return {str(stage): float(size) for stage, size in sizes.items()}


def _hidden(layout: Layout, mesh: Mesh) -> torch.Tensor:
    dtype = PRECISIONS[layout.config.train.precision].model_dtype
    return torch.empty(layout.hidden_shape, dtype=dtype, device=mesh.device)


def _batch(layout: Layout, mesh: Mesh) -> MicroBatch:
    samples = list(range(layout.config.train.micro_batch_size))
    return synthetic_microbatch(layout.config, samples, mesh.device)


def _by_stage(layout: Layout, sizes: list[dict[str, float]]) -> list[float]:
    """The most that any rank says of each stage: replicas and tensor ranks wait for the slowest."""
    stages = (str(stage.number) for stage in layout.stages)
    return [max(rank[stage] for rank in sizes if stage in rank) for stage in stages]


# --- Choosing ------------------------------------------------------------------------------------


def _choose(
    config: Config, measured: Layout, costs: Costs, sizes: list[float], file: Path
) -> list[str]:
    """Search, and write program and reason; returns lines for people. On rank 0."""
    limit, written = _limit(config, sizes)
    pipeline, virtual = measured.axes.size("pipeline"), measured.virtual
    found = search(pipeline, virtual, measured.microbatches, costs, limit)
    source = "measured at the start of the run"
    if config.parallel.stage_costs is not None:
        source = f"from {config.parallel.stage_costs} (parallel.stage_costs)"
    reason = search_report(found, seconds, source, written)
    write_text(reason, file.parent / REASON_FILE)
    with suppress(FileNotFoundError):
        file.replace(file.parent / REPLACED_FILE)
    write_text(to_csv(found.program), file)
    return [*summary(found, seconds), f"  Why: {file.parent / REASON_FILE}; the program: {file}"]


def _limit(config: Config, sizes: list[float]) -> tuple[Limit, str]:
    """The limit, and how to say it."""
    most = byte_limit(config)
    if most is not None:
        return Limit.in_bytes(most, sizes), f"{most.text} on each rank"
    limit = microbatch_limit(config)
    assert limit is not None
    text = f"{limit.value} microbatch{'es' * (limit.most != 1)}"
    if config.parallel.activation_limit is None:
        text += " (as 1f1b has; parallel.activation_limit is not set)"
    return limit, text


def _shared_content(file: Path, ranks: RankGroup) -> bytes | None:
    """What rank 0 reads from `file`, None where it finds none. Raises MegapipeError unless all
    ranks read the same."""
    content = _read(file)
    expected = ranks.all_gather(_digest(content))[0]
    if expected is None:
        return None
    deadline = time.monotonic() + SHARED_WITHIN
    while (same := _digest(content) == expected) is False and time.monotonic() < deadline:
        time.sleep(0.05)  # a network file system may show it late
        content = _read(file)
    if not all(ranks.all_gather(same)):
        raise MegapipeError(
            f"{file} is not the same file for all ranks: train.run_dir must lie on a file system "
            "that they share."
        )
    return content


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _digest(content: bytes | None) -> str | None:
    return None if content is None else sha256(content).hexdigest()
