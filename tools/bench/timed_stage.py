"""A pipeline stage that takes a set time: what is left of a step beside it is the runtime's.

Its graph is the smallest in which the two gradients are apart:

    output = input_part(input) + weight_part(weight)

Backward through the first takes the time of the input's gradient, through the second that of the
weights'. A runtime that splits the backward can so run either without the other: megapipe, because
the second goes through the stage's WeightGradStore; torch.distributed.pipelining, because it cuts
the graph where the ways from input and weight meet, at the sum.
"""

from collections.abc import Callable
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor, nn

from megapipe.microbatch import MicroBatch
from megapipe.pipeline.schedule import Kind
from megapipe.tensor_parallel.weight_grad import WeightGradStore

Part = tuple[str, int]
"""F, I or W, and the microbatch."""

PARTS = {
    Kind.FORWARD: "F",
    Kind.BACKWARD: "IW",
    Kind.BACKWARD_INPUT: "I",
    Kind.BACKWARD_WEIGHT: "W",
}
"""The parts of an action."""


def compute(seconds: float) -> None:
    """Multiply small matrices until the time is over."""
    end = perf_counter() + seconds
    matrix = torch.ones(64, 64)
    while perf_counter() < end:
        torch.mm(matrix, matrix)


WORK: dict[str, Callable[[float], None]] = {"sleep": sleep, "compute": compute}


class TimedStage(nn.Module):
    """A stage for either runtime, on tensors of `shape`. The last returns its loss to megapipe.

    `unit` is the time of F, of I and of W in seconds; 0 does nothing. `spans` says when each
    part of each microbatch began and ended since `start`: sleep takes longer than it is asked to.
    """

    def __init__(self, stage: int, count: int, shape: tuple[int, ...], work: str) -> None:
        super().__init__()
        self.is_first, self.is_last = stage == 0, stage == count - 1
        self.weight = nn.Parameter(torch.zeros(shape))
        self.table = nn.Parameter(torch.zeros(shape)) if self.is_first else None
        self.weight_grads = WeightGradStore()
        self._work = WORK[work]
        self.start(0.0)

    def start(self, unit: float) -> None:
        """Begin a step. Microbatches are counted by their forwards, which come in order."""
        self.unit = unit
        self.spans: dict[Part, tuple[float, float]] = {}
        self._forwards = 0

    def forward(self, inputs: Tensor | None, batch: MicroBatch | None = None) -> Tensor:
        """The first stage has a table, as embeddings are, so that backward reaches its input too;
        what torch hands it is not used. Only megapipe gives a batch."""
        begin = perf_counter()
        microbatch = self._forwards
        self._forwards += 1
        self._spend()
        if self.table is not None:
            inputs = self.table
        output: Tensor = _InputPart.apply(inputs, self, microbatch)
        output = output + _WeightPart.apply(self.weight, self, microbatch)
        if self.is_last and batch is not None:
            output = output.sum()
        self.spans["F", microbatch] = (begin, perf_counter())
        return output

    def backward(self, part: str, microbatch: int, gradient: Tensor) -> Tensor:
        """Do a part, note when that was, and give the gradient on."""
        assert (part, microbatch) not in self.spans, (part, microbatch)
        begin = perf_counter()
        gradient = gradient.clone()
        self._spend()
        self.spans[part, microbatch] = (begin, perf_counter())
        return gradient

    def _spend(self) -> None:
        if self.unit > 0:
            self._work(self.unit)


class _InputPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, stage: TimedStage, microbatch: int) -> Tensor:
        ctx.stage, ctx.microbatch = stage, microbatch
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.stage.backward("I", ctx.microbatch, grads[0]), None, None


class _WeightPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, stage: TimedStage, microbatch: int) -> Tensor:
        ctx.stage, ctx.microbatch = stage, microbatch
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stage, microbatch, gradient = ctx.stage, ctx.microbatch, grads[0]
        if not stage.weight_grads.deferred:
            return stage.backward("W", microbatch, gradient), None, None
        stage.weight_grads.push(lambda: stage.backward("W", microbatch, gradient))
        return None, None, None
