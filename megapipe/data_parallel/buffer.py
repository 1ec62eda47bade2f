"""Contiguous storage: weights, main gradients and master weights of many parameters in a row.

One buffer holds the parameters of one group of the optimizer. Offsets are the same in the weight,
gradient and master tensors, and the length is a multiple of the number of replicas, so that an
optimizer may later work on equal flat shards.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megapipe.layout.layout import Layout
from megapipe.layout.parameters import ParameterShard
from megapipe.optim import parameter_groups
from megapipe.parameter_role import Role
from megapipe.precision import PRECISIONS
from megapipe.tensor_parallel.parameter import ShardedParameter, sharded_parameters

ALIGNMENT = 64
"""Elements: each parameter begins at a multiple of this (256 bytes in float32)."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its buffer."""

    parameter: ShardedParameter
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's part of a flat tensor laid out like the buffer, in its shape."""
        shape = self.parameter.shape
        return flat.narrow(0, self.offset, shape.numel()).view(shape)


class ParameterBuffer:
    """Parameters moved into one flat tensor, beside their gradients and master weights.

    `group` is the number of the optimizer's group. `weights` [length] is in the model's dtype,
    `gradients` and `master` in `main_dtype`; where both dtypes are the same, `master` is `weights`.
    """

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        *,
        group: int,
        main_dtype: torch.dtype,
        replicas: int,
    ) -> None:
        assert parameters, "a buffer without parameters"
        first = parameters[0]
        self.group = group
        self.slots: list[Slot] = []
        length = 0
        for parameter in parameters:
            assert parameter.dtype == first.dtype
            self.slots.append(Slot(parameter, length))
            length += _round_up(parameter.numel(), ALIGNMENT)
        length = _round_up(length, ALIGNMENT * replicas)

        self.weights = torch.zeros(length, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros(length, dtype=main_dtype, device=first.device)
        for slot in self.slots:
            view = slot.view(self.weights)
            view.copy_(slot.parameter.data)
            slot.parameter.data = view
            slot.parameter.attach_main_grad(slot.view(self.gradients))
        same = first.dtype == main_dtype
        self.master = self.weights if same else self.weights.to(main_dtype)

    def shards(self, flat: Tensor) -> Iterator[tuple[ParameterShard, Tensor]]:
        """Each shard of a global tensor with its rectangle of `flat`, laid out like the buffer."""
        for slot in self.slots:
            local = slot.view(flat)
            for shard in slot.parameter.shards:
                yield shard, shard.view(local)

    def owned_runs(self) -> list[slice]:
        """The parts of a flat tensor that this rank owns: the longest runs without a shard that it
        does not. They hold padding too, where gradients are zero."""
        runs: list[slice] = []
        open_run = False
        for slot in self.slots:
            width = slot.parameter.shape[1:].numel()
            for shard in slot.parameter.shards:
                start = slot.offset + shard.row * width
                stop = start + shard.shape[0] * width
                if shard.owner and start < stop:
                    first = runs.pop().start if open_run else start
                    runs.append(slice(first, stop))
                open_run = shard.owner if start < stop else open_run
        return runs

    def publish_master(self) -> None:
        """Round the master weights into the weights that the model computes with."""
        if self.master is not self.weights:
            self.weights.copy_(self.master)


def build_buffers(
    stages: Iterable[nn.Module],
    groups: Sequence[Collection[Role]],
    *,
    main_dtype: torch.dtype,
    replicas: int,
) -> list[ParameterBuffer]:
    """Move all parameters of this rank's stages into buffers, one for each group of roles that has
    parameters here, in order.

    Each role belongs to one group. A parameter that two stages share (tied embeddings on one rank)
    gets one slot.
    """
    unique: dict[ShardedParameter, None] = {}
    for stage in stages:
        unique.update(dict.fromkeys(sharded_parameters(stage)))
    assert sorted(role for roles in groups for role in roles) == sorted(Role), groups
    members = [[parameter for parameter in unique if parameter.role in roles] for roles in groups]
    return [
        ParameterBuffer(parameters, group=number, main_dtype=main_dtype, replicas=replicas)
        for number, parameters in enumerate(members)
        if parameters
    ]


def layout_buffers(layout: Layout, stages: Iterable[nn.Module]) -> list[ParameterBuffer]:
    """The buffers of this rank's stages as the layout's config wants them."""
    config = layout.config
    return build_buffers(
        stages,
        [group.roles for group in parameter_groups(config.optimizer)],
        main_dtype=PRECISIONS[config.train.precision].main_dtype,
        replicas=layout.replicas,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
