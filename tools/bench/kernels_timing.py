"""Seconds and memory of GPU work, and what the GPU can do at best, measured the same way."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

Timer = Callable[[Callable[[], object]], list[float]]
"""Runs work some times; the seconds of each."""

FLUSH_BYTES = 2**30
"""Written before each run, so that the L2 cache (50 MiB in H100, 126 MiB in B200) holds none of
the inputs. It also keeps the GPU busy, for 0.3 ms, while the host launches what is timed."""
MOST_FLUSHES = 256
COPY_BYTES = 2**30
MATMUL_SIZE = 8192
WARM_UPS = 3


class LaunchBoundError(Exception):
    """The GPU was always done before the host had launched all that is timed."""


class DeviceTimer:
    """By CUDA events, on this GPU; the cache is flushed before each run.

    A run counts only if all of it was launched before the GPU began with it: else the time between
    two small kernels would be that of launching them. Where the host is slower than a flush, there
    are as many flushes as it needs.
    """

    def __init__(self, device: torch.device, runs: int, flush_bytes: int = FLUSH_BYTES) -> None:
        self.device, self.runs = device, runs
        self.flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object]) -> list[float]:
        for _ in range(WARM_UPS):
            work()
        pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        flushes = 1
        while len(pairs) < self.runs:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                self.flush.zero_()
            start.record()
            work()
            end.record()
            if not start.query():
                pairs.append((start, end))
            elif flushes < MOST_FLUSHES:
                flushes *= 2
            else:
                raise LaunchBoundError(
                    f"the GPU had begun before all was launched, {flushes} times"
                )
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


class HostTimer:
    """By the host's clock, of work that the CPU does itself."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def __call__(self, work: Callable[[], object]) -> list[float]:
        work()
        seconds = []
        for _ in range(self.runs):
            began = perf_counter()
            work()
            seconds.append(perf_counter() - began)
        return seconds


def measured_peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that work holds at a time beyond what there was before; None without a GPU,
    for torch counts only there."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class Best:
    """What a GPU does at best, per second."""

    copied_bytes: float  # read and written
    matmul_flops: float


def measure_best(
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    *,
    copy_bytes: int = COPY_BYTES,
    matmul_size: int = MATMUL_SIZE,
) -> Best:
    """A copy of a buffer and a square matrix product."""
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = median(timer(lambda: target.copy_(source)))
    # Of random numbers: a GPU works faster on zeros, which take less power.
    a, b = (torch.randn(matmul_size, matmul_size, device=device).to(dtype) for _ in range(2))
    multiplying = median(timer(lambda: a @ b))
    return Best(2 * copy_bytes / copying, 2 * matmul_size**3 / multiplying)
