"""Parameters that know which part of which global tensor they hold."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megapipe.distributed.mesh import Axis
from megapipe.parameter_role import Role


@dataclass(frozen=True)
class Piece:
    """A rectangle of a global tensor, held in some rows of a local parameter.

    Rows `row .. row + shape[0]` of the parameter (all its columns) are the rectangle that begins
    at `start` of the global tensor `name`. Rows that belong to no piece are padding.

    `sum_over` names the ranks whose gradients of this rectangle are partial and must be summed;
    None means that the local gradient is complete (in this data-parallel replica). `counted` is
    true on one holder of each rectangle: who counts it in norms and saves it.
    """

    name: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    row: int = 0
    sum_over: Axis | None = None
    counted: bool = True

    def view(self, local: Tensor) -> Tensor:
        """The rectangle within `local`, a tensor shaped like the parameter."""
        return local.narrow(0, self.row, self.shape[0])


class ShardedParameter(nn.Parameter):
    """A local parameter made of pieces of global tensors.

    `main_grad` is the float32 (float64 in proofs) buffer in which its gradient accumulates over
    microbatches; `attach_main_grad` sets it, and no `.grad` is kept.
    """

    pieces: tuple[Piece, ...]
    role: Role
    main_grad: Tensor

    def __new__(
        cls,
        shape: tuple[int, ...],
        pieces: tuple[Piece, ...],
        *,
        role: Role,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "ShardedParameter":
        data = torch.zeros(shape, dtype=dtype, device=device)
        self: ShardedParameter = super().__new__(cls, data, True)
        self.pieces = pieces
        self.role = role
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def attach_main_grad(self, buffer: Tensor) -> None:
        """Let gradients accumulate in `buffer`, shaped like the parameter.

        Linear layers and embeddings add to it themselves. What autograd delivers for the others
        (norm weights, biases) is moved there as soon as it is there.
        """
        assert buffer.shape == self.shape
        self.main_grad = buffer
        self.register_post_accumulate_grad_hook(_move_to_main_grad)

    def retarget(self, *, sum_over: Axis | None, counted: bool) -> None:
        """Make each piece one of several copies, whose gradients are summed over `sum_over`."""
        self.pieces = tuple(replace(p, sum_over=sum_over, counted=counted) for p in self.pieces)


def sharded_parameters(module: nn.Module) -> Iterator[ShardedParameter]:
    """The module's parameters, each once, in the order in which the module made them."""
    for parameter in module.parameters():
        assert isinstance(parameter, ShardedParameter), "a layer made an ordinary parameter"
        yield parameter


def _move_to_main_grad(parameter: Tensor) -> None:
    assert isinstance(parameter, ShardedParameter)
    if parameter.grad is not None:  # None: the layer has added to main_grad itself
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
