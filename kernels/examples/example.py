"""A call of a kernel at the sizes of a layer, as data: what proves and what measures kernels takes
its inputs from here.

The calls themselves are in elementwise.py (norms, activations, rotary positions, dropout),
products.py (losses, attention) and optimizer.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHECKED_SEQUENCE, CHECKED_SHARD = 1024, 2**24
"""Errors are found with this much of a shape: float64 scores of 8192 positions fit on no GPU."""


@dataclass(frozen=True)
class LayerShape:
    """What one rank of `tensor` ranks computes of a layer of a model."""

    model: str
    tensor: int
    batch: int
    sequence: int
    sequence_part: int  # of norms and dropout: sequence parallelism cuts the tokens there
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    shard: int  # elements of the flat buffer of one layer's weights

    @property
    def label(self) -> str:
        return f"{self.model}, tensor {self.tensor}"

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def tokens_part(self) -> int:
        return self.batch * self.sequence_part

    def checked(self) -> "LayerShape":
        """The same with one short sequence."""
        sequence = min(self.sequence, CHECKED_SEQUENCE)
        return replace(
            self,
            batch=1,
            sequence=sequence,
            sequence_part=max(1, sequence // self.tensor),
            shard=min(self.shard, CHECKED_SHARD),
        )


class RandomInputs:
    """Draws inputs, the same for the same seed; on the meta device they have no values."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.generator = None
        if device.type != "meta":
            self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, scale: float = 1.0, wide: bool = False) -> Tensor:
        """In the dtype, or in the one that sums and optimizer state have."""
        dtype = self.wide if wide else self.dtype
        x = torch.empty(size, dtype=dtype, device=self.device)
        return x if self.generator is None else x.normal_(0, scale, generator=self.generator)

    def below(self, limit: int, *size: int) -> Tensor:
        if self.generator is None:
            return torch.empty(size, dtype=torch.int64, device=self.device)
        return torch.randint(limit, size, generator=self.generator, device=self.device)


Function = Callable[..., Sequence[Tensor]]
"""Takes an example's inputs; its outputs, or the inputs that it has changed."""


@dataclass(frozen=True)
class Example:
    """A call of one kernel; `name` is that of its file, `call` takes the inputs and `backend`."""

    name: str
    make: Callable[[LayerShape, RandomInputs], list[Tensor]]
    call: Function
    differentiable: Sequence[int]  # which inputs

    def inputs(self, shape: LayerShape, draw: RandomInputs) -> list[Tensor]:
        made = self.make(shape, draw)
        for index in self.differentiable:
            made[index].requires_grad_()
        return made


def widened(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in float64."""
    return [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]


def gradients_for(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What flows back: 1 into a loss, else random numbers of about 1 in the output's layout, the
    same for each dtype."""
    return [
        torch.ones_like(y)
        if y.dim() == 0
        else torch.empty_like(y).copy_(
            RandomInputs(y.device, torch.float32, seed=1 + i).normal(*y.shape).bfloat16()
        )
        for i, y in enumerate(outputs)
    ]


def values_and_gradients(
    example: Example, function: Function, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, then the gradient of each differentiable input."""
    outputs = function(*inputs)
    gradients: Sequence[Tensor] = ()
    if example.differentiable:
        leaves = [inputs[index] for index in example.differentiable]
        gradients = torch.autograd.grad(outputs, leaves, gradients_for(outputs))
    return [x.detach() for x in (*outputs, *gradients)]
