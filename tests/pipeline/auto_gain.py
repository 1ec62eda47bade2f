"""What `auto` gains over 1F1B where stages are unequal: predicted, and in real processes.

    OMP_NUM_THREADS=1 python -m tests.pipeline.auto_gain

Stages sleep for set times, one 1.5 times as long as the others, and the last one longer, as an
output layer over a large vocabulary makes it. Both programs run in turns; times are medians.
"""

from collections.abc import Sequence
from random import Random
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist

from megapipe.distributed.mesh import build_mesh
from megapipe.layout.axes import Axes
from megapipe.microbatch import MicroBatch
from megapipe.pipeline.executor import PipelineExecutor
from megapipe.pipeline.p2p import make_channels
from megapipe.pipeline.schedule import Costs, Program, build_program, lower, simulate
from megapipe.pipeline.schedule.action import stage_ranks
from megapipe.pipeline.schedule.limit import Limit
from megapipe.pipeline.schedule.search import search
from tests.pipeline.sleeping import SleepingStage
from tests.ranks import POOL, run_ranks

RANKS, MICROBATCHES, REPEATS = 4, 16, 7
SHAPE = (1, 8)


def unequal_seconds(seed: int) -> list[float]:
    """About 20 ms, of each stage: what its F, I and W each take."""
    random = Random(seed)
    slow = random.randrange(RANKS - 1)
    scales = [random.uniform(0.9, 1.1) for _ in range(RANKS)]
    scales[slow] *= 1.5
    scales[-1] *= random.uniform(1.3, 1.8)
    return [0.02 * scale for scale in scales]


def steps(programs: Sequence[Program], seconds_of: Sequence[float]) -> list[list[float]]:
    """On one rank: seconds of the steps of each, in turns."""
    mesh = build_mesh(Axes.of(pipeline=RANKS, data=1, tensor=1), torch.device("cpu"))
    channels, executors = make_channels(mesh), []
    for program in programs:
        lowered = lower(program)
        ranks = stage_ranks(lowered)
        stages = {
            stage: SleepingStage((seconds_of[stage],) * 3, SHAPE, stage == len(ranks) - 1)
            for stage, rank in ranks.items()
            if rank == mesh.pipeline.rank
        }
        executors.append(
            PipelineExecutor(
                lowered,
                stages,
                channels,
                hidden_shape=SHAPE,
                dtype=torch.float32,
                device=torch.device("cpu"),
            )
        )
    batches = [MicroBatch(None, None, None, torch.arange(1)) for _ in range(MICROBATCHES)]
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(1 + REPEATS):  # the first one warms up
        for executor, found in zip(executors, seconds, strict=True):
            dist.barrier()
            begin = perf_counter()
            executor.run(batches)
            dist.barrier()
            found.append(perf_counter() - begin)
    return [found[1:] for found in seconds]


def main() -> None:
    """A line for each of three cases."""
    for seed in range(3):
        seconds_of = unequal_seconds(seed)
        costs = Costs(seconds_of, seconds_of, seconds_of)
        limit = Limit.in_microbatches(RANKS, RANKS, 1)
        plain = build_program("1f1b", pipeline=RANKS, virtual=1, microbatches=MICROBATCHES)
        found = search(RANKS, 1, MICROBATCHES, costs, limit)
        programs = (plain, found.program)
        predicted = [simulate(program, costs).makespan for program in programs]
        by_rank = run_ranks(steps, RANKS, programs, seconds_of)
        measured = [
            median(max(at) for at in zip(*(rank[i] for rank in by_rank), strict=True))
            for i in range(2)
        ]
        gains = [1 - own / other for other, own in (predicted, measured)]
        print(
            f"case {seed}: 1f1b {predicted[0] * 1e3:.0f} ms predicted, {measured[0] * 1e3:.0f} "
            f"measured; {found.chosen.name} {predicted[1] * 1e3:.0f} and {measured[1] * 1e3:.0f}: "
            f"gain {gains[0]:.1%} predicted, {gains[1]:.1%} measured, "
            f"{gains[1] / gains[0]:.0%} of it",
            flush=True,
        )
    POOL.close()


if __name__ == "__main__":
    main()
