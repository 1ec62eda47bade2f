"""Parameters of a table on one tensor rank, for tests of the layers that use them."""

from collections.abc import Sequence

import torch

from megapipe.distributed.mesh import Axis, build_mesh
from megapipe.layout.axes import Axes
from megapipe.layout.parameters import LAST, Init, ParameterSpec, Split, shard_of
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.parameter import StageParameters

CPU, FLOAT64 = torch.device("cpu"), torch.float64
MULTIPLE = 64
"""Rows of the vocabulary on a rank are padded to a multiple of this."""


def tensor_axis(size: int) -> Axis:
    """The tensor axis of a world that has no other. Collective."""
    return build_mesh(Axes.of(tensor=size), CPU).tensor


def parameters_of(
    table: Sequence[ParameterSpec], tensor: Axis, *, sequence_parallel: bool = False
) -> StageParameters:
    """What the rank holds of a table, in float64."""
    shards = {
        spec.name: shard_of(
            spec,
            tensor_rank=tensor.rank,
            tensor_size=tensor.size,
            sequence_parallel=sequence_parallel,
        )
        for spec in table
    }
    return StageParameters(shards, dtype=FLOAT64, device=CPU)


def matrix(
    name: str, out: int, into: int, *, dim: int = 0, units: int | None = None
) -> ParameterSpec:
    """The weight [out, in] of a linear layer, split along `dim`."""
    return ParameterSpec(name, (out, into), (0,), Init("zeros"), Role.MATRIX, Split(dim, units))


def vocabulary(name: str, rows: int, hidden: int) -> ParameterSpec:
    """The weight of an embedding or an output layer, its rows padded on each rank."""
    split = Split(0, pad_to=MULTIPLE)
    return ParameterSpec(name, (rows, hidden), (LAST,), Init("zeros"), Role.OUTPUT, split)
