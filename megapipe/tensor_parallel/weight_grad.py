"""Weight gradients apart from input gradients, so that a schedule may place them freely.

Zero-bubble schedules (Qi et al., ICLR 2024) send the input gradient to the stage before at once and
fill the bubbles with weight gradients later. Autograd computes both together; our linear layers
instead hand each weight gradient here as a closure.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megapipe.kernels import WeightGradBackend


class WeightGradStore:
    """Runs weight-gradient closures at once, or collects them while `defer` is active.

    One store serves all layers of one stage. `backend` is what the closures compute with.
    """

    def __init__(self, backend: WeightGradBackend = "torch") -> None:
        self.backend = backend
        self._pending: list[Callable[[], None]] | None = None

    @property
    def deferred(self) -> bool:
        return self._pending is not None

    def push(self, compute: Callable[[], None]) -> None:
        if self._pending is None:
            compute()
        else:
            self._pending.append(torch.no_grad()(compute))  # as inside a backward

    @contextmanager
    def defer(self) -> Iterator[list[Callable[[], None]]]:
        """Collect the closures pushed inside the block in the list that it yields."""
        assert self._pending is None, "defer does not nest"
        self._pending = []
        try:
            yield self._pending
        finally:
            self._pending = None
