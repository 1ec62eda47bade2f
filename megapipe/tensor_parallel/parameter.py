"""Parameters that know which part of which global tensor they hold."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megapipe.layout.parameters import ParameterShard
from megapipe.parameter_role import Role


class ShardedParameter(nn.Parameter):
    """A local parameter made of shards of global tensors, stacked along its rows.

    `main_grad` is the float32 (float64 in equivalence checks) buffer in which its gradient
    accumulates over microbatches; `attach_main_grad` sets it, and no `.grad` is kept.
    """

    shards: tuple[ParameterShard, ...]
    role: Role
    main_grad: Tensor

    def __new__(
        cls,
        shards: tuple[ParameterShard, ...],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "ShardedParameter":
        rows = sum(shard.rows for shard in shards)
        data = torch.zeros((rows, *shards[0].shape[1:]), dtype=dtype, device=device)
        self: ShardedParameter = super().__new__(cls, data, True)
        stacked, row = [], 0
        for shard in shards:
            stacked.append(replace(shard, row=row))
            row += shard.rows
        self.shards = tuple(stacked)
        (self.role,) = {shard.spec.role for shard in shards}
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


class StageParameters:
    """The parameters of a stage on this rank, which its layers ask for by name.

    `shards` are those of the layout; `made` are parameters that other stages of the rank have made:
    one that two of them use (a tied embedding) is one tensor.
    """

    def __init__(
        self,
        shards: Mapping[str, ParameterShard],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        made: Mapping[str, ShardedParameter] | None = None,
    ) -> None:
        self._shards = shards
        self._dtype, self._device = dtype, device
        self.made = {name: one for name, one in (made or {}).items() if name in shards}

    def get(self, *names: str) -> ShardedParameter:
        """The local parameter that holds these shards, stacked; made at the first call. A name is
        asked for alone or always with the same others."""
        if not any(name in self.made for name in names):
            shards = tuple(self._shards[name] for name in names)
            parameter = ShardedParameter(shards, dtype=self._dtype, device=self._device)
            self.made |= dict.fromkeys(names, parameter)
        found = next(self.made[name] for name in names if name in self.made)
        stacked = tuple(shard.name for shard in found.shards)
        assert stacked == names, f"{names} are asked for, and {stacked} are in one parameter"
        return found

    def optional(self, *names: str) -> ShardedParameter | None:
        """As `get`; None where the model has no such parameters (biases)."""
        there = [name for name in names if name in self._shards]
        assert there in ([], [*names]), f"of {names} the model has {there} alone"
        return self.get(*names) if there else None

    @property
    def missing(self) -> list[str]:
        """The names of those that no layer has asked for."""
        return [name for name in self._shards if name not in self.made]


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
