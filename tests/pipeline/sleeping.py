"""Stages that take set times and compute next to nothing."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from megapipe.microbatch import MicroBatch
from megapipe.tensor_parallel.weight_grad import WeightGradStore


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: "SleepingStage") -> Tensor:
        ctx.stage = stage
        ctx.save_for_backward(x)
        time.sleep(stage.times[0])
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        stage: SleepingStage = ctx.stage
        time.sleep(stage.times[1])
        stage.weight_grads.push(lambda: time.sleep(stage.times[2]))
        return grads[0] * 2, None


class SleepingStage(nn.Module):
    """`times` are seconds of forward, input gradient and weight gradient."""

    def __init__(self, times: tuple[float, float, float], hidden: tuple[int, ...], last: bool):
        super().__init__()
        self.times, self.hidden, self.last = times, hidden, last
        self.weight_grads = WeightGradStore()

    def forward(self, inputs: Tensor | None, batch: MicroBatch) -> Tensor:
        x = torch.zeros(self.hidden, requires_grad=True) if inputs is None else inputs
        y: Tensor = _Sleep.apply(x, self)
        return y.sum() if self.last else y
