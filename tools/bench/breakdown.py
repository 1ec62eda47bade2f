"""Where the time of one training step goes: its share by GPU kernel, or by operation on a CPU."""

from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

Share = tuple[str, float, int]
"""(name, share of the time of all, calls)."""


def profile_step(step: Callable[[], object], device: torch.device) -> list[Share]:
    """Take a step under torch's profiler; longest first, times without those of inner operations.

    On a GPU the shares are of the time in which a kernel ran: waits of the GPU are in none.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    times = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in profiler.key_averages()
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = sum(time for _, time, _ in times)
    shares = [(name, time / total, event.count) for name, time, event in times if time > 0]
    return sorted(shares, key=lambda share: -share[1])


def print_breakdown(title: str, shares: Sequence[Share], rows: int = 15) -> None:
    """The longest and the rest as one line."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "share", "calls", title=title)
    for name, share, calls in shares[:rows]:
        table.add_row(name[:70], f"{share:.1%}", str(calls))
    if rest := shares[rows:]:
        share, calls = sum(s for _, s, _ in rest), sum(c for _, _, c in rest)
        table.add_row(f"{len(rest)} others", f"{share:.1%}", str(calls))
    Console(width=100).print(table)
