"""What `megapipe bench kernels` compares: for each kernel the contenders, and its work.

A case is data. The cases themselves are in kernels_elementwise.py (norms, activations, rotary
positions, dropout), kernels_products.py (losses, attention) and kernels_optimizer.py; their inputs
are those of megapipe.kernels.examples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from megapipe.kernels.examples.example import Example, Function, LayerShape


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


@dataclass(frozen=True)
class Case:
    """One kernel, by an example of its call.

    `eager` is torch as users write it, `exact` (by default the same) what is run in float64 to find
    errors. `liger` imports when it is called. Work is in bfloat16; `backward` is None where there
    is no gradient.
    """

    example: Example
    bound: Literal["memory", "matmul"]
    eager: Function
    forward: Callable[[LayerShape], Work]
    backward: Callable[[LayerShape], Work] | None = None
    liger: Function | None = None
    exact: Function | None = None
    others: Mapping[str, Function] = field(default_factory=dict)  # further contenders
    draws: bool = False  # eager and Liger draw a mask of their own: no values to compare

    @property
    def name(self) -> str:
        return self.example.name

    def work(self, shape: LayerShape, backward: bool) -> Work:
        """Of the forward pass, or of both."""
        assert self.backward is not None or not backward
        forward = self.forward(shape)
        return forward + self.backward(shape) if backward and self.backward else forward
