"""Losses by source of the data, summed where the loss is computed."""

import torch
from torch import Tensor

from megapipe.microbatch import IGNORED_TARGET

ELEMENTS = 2**20
"""Sources times targets that are looked at together: 4 MiB of float32."""


class SourceLosses:
    """For each source, the targets that count and the sum of their losses, since `begin`.

    Sums stay on the device. They are the same bits whenever the same microbatches are added in the
    same order: nothing is added atomically.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin(0)

    def begin(self, sources: int) -> None:
        """Start at zero, for sources 0 to `sources` - 1."""
        self._numbers = torch.arange(sources, dtype=torch.int32, device=self._device).unsqueeze(1)
        self.tokens = torch.zeros(sources, dtype=torch.int64, device=self._device)
        self.losses = torch.zeros(sources, dtype=torch.float64, device=self._device)

    def add(self, losses: Tensor, targets: Tensor, sources: Tensor) -> None:
        """A microbatch: three tensors of one shape, with the loss, the class and the source of each
        target. A source beyond those of `begin` is counted nowhere."""
        losses_N, targets_N, sources_N = (x.reshape(-1) for x in (losses, targets, sources))
        counted_N = targets_N != IGNORED_TARGET
        size = max(1, ELEMENTS // max(1, targets_N.numel()))
        for first in range(0, len(self._numbers), size):
            part = slice(first, first + size)
            own = (sources_N == self._numbers[part]) & counted_N
            self.tokens[part].add_(own.sum(1))
            self.losses[part].add_(torch.where(own, losses_N, 0).sum(1, dtype=torch.float64))
