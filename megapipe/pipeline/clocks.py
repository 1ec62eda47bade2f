"""How far the clocks of the ranks of an axis are apart.

`perf_counter` has an origin of its own on each host. All ranks go through ROUNDS all-reduces and
note their clock before and after each. No rank leaves an all-reduce before the last has entered it,
so for two ranks a and b of any round, with b's clock `d` ahead of a's,

    before_b - after_a  <  d  <  after_b - before_a

and the tightest bounds of all rounds are kept. The estimate is their middle, and is wrong by at
most half of what lies between them: about as long as a small all-reduce takes (processes of one
machine over gloo: 0.1 ms; the bound is returned, and written into the timeline). Clocks that agree
within the bound are taken to be the same clock, which they are on one host.

The clocks of different hosts drift, by up to 0.5 ms in 10 s while their time service corrects them:
so this is done right after the steps that are to be compared.
"""

from time import perf_counter
from typing import NamedTuple

import torch

from megapipe.distributed.mesh import Axis
from megapipe.tensor_parallel.collectives import all_gather, all_reduce_

ROUNDS = 16


class ClockOffset(NamedTuple):
    """A rank's clock minus that of the axis's first rank, in seconds, give or take `error`."""

    seconds: float
    error: float


def clock_offsets(axis: Axis, device: torch.device) -> list[ClockOffset]:
    """One for each rank of the axis, the same on all ranks. Collective over the axis."""
    element = torch.zeros(1, device=device)
    times = torch.empty(1, 2, ROUNDS, dtype=torch.float64)
    for index in range(ROUNDS):
        times[0, 0, index] = perf_counter()
        all_reduce_(element, axis).item()  # .item() waits for the GPU
        times[0, 1, index] = perf_counter()
    before_R, after_R = all_gather(times.to(device), axis).cpu().unbind(1)  # [ranks, ROUNDS] each
    least = (before_R - after_R[0]).amax(1)
    most = (after_R - before_R[0]).amin(1)
    return [_between(low, high) for low, high in zip(least.tolist(), most.tolist(), strict=True)]


def _between(low: float, high: float) -> ClockOffset:
    error = (high - low) / 2
    middle = (high + low) / 2
    return ClockOffset(0.0 if abs(middle) <= error else middle, error)
