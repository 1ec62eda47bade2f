"""What `megapipe bench kernels` compares: for each kernel its inputs, the contenders, and its work.

A case is data. The cases themselves are in kernels_elementwise.py (norms, activations, rotary
positions, dropout), kernels_products.py (losses, attention) and kernels_optimizer.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from megapipe.models.gpt_config import GPTConfig
from megapipe.models.presets import PRESETS

TOKENS, LONGEST = 8192, 8192
"""Of a microbatch, in as few sequences as the model takes."""
CHECKED_SEQUENCE, CHECKED_SHARD = 1024, 2**24
"""Errors are found with this much of a shape: float64 scores of 8192 positions fit on no GPU."""


@dataclass(frozen=True)
class Shape:
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

    def checked(self) -> "Shape":
        """The same with one short sequence."""
        sequence = min(self.sequence, CHECKED_SEQUENCE)
        return replace(
            self,
            batch=1,
            sequence=sequence,
            sequence_part=max(1, sequence // self.tensor),
            shard=min(self.shard, CHECKED_SHARD),
        )


def shape_of(preset: str, tensor: int, sequence_length: int | None = None) -> Shape | None:
    """None where that many ranks can't share the model's heads, vocabulary aside (it is padded).
    Without a length, the longest sequence that the model takes, up to `LONGEST`."""
    model = GPTConfig(**PRESETS[preset])
    kv_heads = model.num_kv_heads
    shared = kv_heads % tensor == 0 or tensor % kv_heads == 0
    if model.num_heads % tensor or model.ffn_hidden_size % tensor or not shared:
        return None
    sequence = sequence_length or min(LONGEST, model.max_sequence_length)
    heads, kv_heads = model.num_heads // tensor, max(1, kv_heads // tensor)
    ffn = model.ffn_hidden_size // tensor
    matrices = 3 if model.activation == "swiglu" else 2
    attention = model.hidden_size * model.head_dim * 2 * (heads + kv_heads)
    return Shape(
        model=preset,
        tensor=tensor,
        batch=max(1, TOKENS // sequence),
        sequence=sequence,
        sequence_part=sequence // tensor,
        hidden=model.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=model.head_dim,
        ffn=ffn,
        vocab=-(-model.vocab_size // tensor),
        shard=attention + matrices * model.hidden_size * ffn,
    )


class Source:
    """Draws a case's inputs, the same for the same seed; on the meta device they have no values."""

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


@dataclass(frozen=True)
class Work:
    """Bytes that a fused kernel moves, by what they are, if each is moved once, and FLOPs."""

    moved: dict[str, int]
    flops: int

    @property
    def bytes(self) -> int:
        return sum(self.moved.values())

    def __add__(self, other: "Work") -> "Work":
        later = {f"backward: {name}": count for name, count in other.moved.items()}
        return Work(self.moved | later, self.flops + other.flops)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The least time it can take: data and arithmetic at the same time."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


Function = Callable[..., Sequence[Tensor]]
"""Takes a case's inputs; its outputs, or the inputs that it has changed."""


@dataclass(frozen=True)
class Case:
    """One kernel.

    `eager` is torch as users write it, `exact` (by default the same) what is run in float64 to find
    errors. `ours` also takes `backend`. `liger` imports when it is called. Work is in bfloat16;
    `backward` is None where there is no gradient.
    """

    name: str  # of the kernel's file
    bound: Literal["memory", "matmul"]
    make: Callable[[Shape, Source], list[Tensor]]
    differentiable: Sequence[int]  # which inputs
    ours: Function
    eager: Function
    forward: Callable[[Shape], Work]
    backward: Callable[[Shape], Work] | None = None
    liger: Function | None = None
    exact: Function | None = None
    others: Mapping[str, Function] = field(default_factory=dict)  # further contenders
    draws: bool = False  # eager and Liger draw a mask of their own: no values to compare

    def inputs(self, shape: Shape, source: Source) -> list[Tensor]:
        made = self.make(shape, source)
        for index in self.differentiable:
            made[index].requires_grad_()
        return made

    def work(self, shape: Shape, backward: bool) -> Work:
        """Of the forward pass, or of both."""
        assert self.backward is not None or not backward
        forward = self.forward(shape)
        return forward + self.backward(shape) if backward and self.backward else forward


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
            Source(y.device, torch.float32, seed=1 + i).normal(*y.shape).bfloat16()
        )
        for i, y in enumerate(outputs)
    ]


def values_and_gradients(case: Case, function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of each differentiable input."""
    outputs = function(*inputs)
    gradients: Sequence[Tensor] = ()
    if case.differentiable:
        leaves = [inputs[index] for index in case.differentiable]
        gradients = torch.autograd.grad(outputs, leaves, gradients_for(outputs))
    return [x.detach() for x in (*outputs, *gradients)]
