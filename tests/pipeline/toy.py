"""A small model in stages, in float64, for the executor to run, and what one process computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from megapipe.microbatch import MicroBatch
from megapipe.tensor_parallel.weight_grad import WeightGradStore

S, B, H, VOCABULARY = 3, 2, 4, 7
HIDDEN = (S, B, H)


class Token:
    """Lives as long as the activations of one microbatch at one stage."""


class _Linear(torch.autograd.Function):
    """x W^T with the weight gradient handed to the store; saves its input as it comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stage: "ToyStage") -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.stage, ctx.token = weight, stage, Token()
        stage.live.add(ctx.token)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        (x,) = ctx.saved_tensors
        weight, stage, token = ctx.weight, ctx.stage, ctx.token

        def weight_grad() -> None:
            assert isinstance(token, Token)
            stage.main_grad += grad_out.flatten(0, 1).t() @ x.flatten(0, 1)

        stage.weight_grads.push(weight_grad)
        return grad_out @ weight, None, None


class ToyStage(nn.Module):
    """The input goes straight into a linear layer, and the output's gradient into its backward:
    received buffers are saved on both ways. Microbatch `fails_at` raises."""

    def __init__(self, stage: int, count: int, fails_at: Exception | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(stage)

        def values(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator))

        self.table = values(VOCABULARY, H) if stage == 0 else None
        self.weight, self.bias = values(H, H), values(H)
        self.is_last = stage == count - 1
        self.weight_grads = WeightGradStore()
        self.main_grad = torch.zeros(H, H, dtype=torch.float64)
        self.live: WeakSet[Token] = WeakSet()
        self.fails_at = fails_at
        self.addresses: set[int] = set()

    def forward(self, inputs: Tensor | None, batch: MicroBatch) -> Tensor:
        if self.fails_at is not None and int(batch.samples_B[0]) == 2 * B:
            raise self.fails_at
        if self.table is not None:
            assert inputs is None
            assert batch.tokens_BS is not None
            x = nn.functional.embedding(batch.tokens_BS.t(), self.table)
        else:
            assert inputs is not None
            self.addresses.add(inputs.data_ptr())
            x = inputs
        y: Tensor = _Linear.apply((x + self.bias).tanh() if self.is_last else x, self.weight, self)
        if not self.is_last:
            return y + self.bias
        assert batch.targets_BS is not None
        return (y.sum(-1) - batch.targets_BS.t()).square().sum()


class PassOn(ToyStage):
    """Gives on a view of what came, and of the gradient that came."""

    def forward(self, inputs: Tensor | None, batch: MicroBatch) -> Tensor:
        assert inputs is not None
        return inputs.view(S, B, H)


def make_batches(count: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(99)

    def draw() -> Tensor:
        return torch.randint(VOCABULARY, (B, S), generator=generator)

    return [
        MicroBatch(draw(), draw(), None, torch.arange(B) + B * microbatch)
        for microbatch in range(count)
    ]


@dataclass
class Outcome:
    """What a run left: losses, and each gradient by its name, "stage.parameter"."""

    losses: list[float]
    gradients: dict[str, Tensor]


def outcome(losses: Sequence[Tensor], stages: Mapping[int, ToyStage]) -> Outcome:
    gradients = {}
    for number, stage in stages.items():
        gradients[f"{number}.weight"] = stage.main_grad.clone()
        for name, parameter in stage.named_parameters():
            if parameter.grad is not None:
                gradients[f"{number}.{name}"] = parameter.grad.clone()
    return Outcome([float(loss) for loss in losses], gradients)


def one_process(stages: Sequence[ToyStage], batches: Sequence[MicroBatch]) -> Outcome:
    """Forward and backward of each microbatch through all stages by autograd alone."""
    losses = []
    for batch in batches:
        x = None
        for stage in stages:
            x = stage(x, batch)
        assert x is not None
        losses.append(x.detach())
        x.backward()
    return outcome(losses, dict(enumerate(stages)))
