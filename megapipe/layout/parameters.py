"""What a model's parameters are and how ranks share them: the one statement of sharding.

A model family gives a table of `ParameterSpec`. All else follows from it: what a layer allocates,
what it starts with, which ranks add up its gradient, who counts and saves it, what a plan adds up.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megapipe.parameter_role import Role

if TYPE_CHECKING:
    from torch import Tensor

End = Literal["first", "last"]
Place = int | End
"""Where in the model a parameter is used: in a layer, before the first or after the last one."""

FIRST: End = "first"
LAST: End = "last"


@dataclass(frozen=True)
class Init:
    """How a parameter starts; `std` matters for "normal" only."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


@dataclass(frozen=True)
class Split:
    """The ranks of the tensor axis hold different blocks of dimension `dim`.

    units: the dimension is this many equal blocks that stay whole (heads); None: any row can be
    cut off. Where units are fewer than ranks, neighbouring ranks hold a copy of the same one, each
    with a part of its gradient.
    pad_to: local rows are padded to a multiple of this, the same number on each rank; the padding
    is zero, gets no gradient and is in no checkpoint. Without it ranks divide what there is: the
    number of units (or of rows) is a multiple of the number of ranks or divides it.
    """

    dim: int
    units: int | None = None
    pad_to: int | None = None


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter under its global name, which says nothing of any layout.

    shape: global; linear weights are [out, in].
    places: where it is used; a tied embedding in two places.
    split: how tensor ranks split it; None: each holds all of it.
    partial: for one that each tensor rank holds whole, when the ranks have only parts of its
    gradient, which must be summed: "always" (each rank computes other heads with it), "sequence"
    (each applies it to its part of the sequence, under sequence parallelism), or "never".
    role: what it is to the model, by which optimizers tell parameters apart.
    """

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    init: Init
    role: Role
    split: Split | None = None
    partial: Literal["never", "sequence", "always"] = "never"

    @property
    def size(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


ReductionGroup = tuple[tuple[str, tuple[int, ...]], ...]
"""Ranks whose partial gradients of a shard are added up: for some axes, the places on them that
belong to it. In all other coordinates the ranks of one group agree."""


@dataclass(frozen=True)
class ParameterShard:
    """The rectangle of a parameter that a rank holds, from `start` of the global tensor.

    In the local tensor it is the rows from `row` on (all columns); `padding` rows behind it belong
    to nothing.

    reduction_group: the ranks of the replica whose gradients of it are partial, to be summed; None:
    the local gradient is complete, but for the ranks that read other samples.
    owner: true on one of the ranks of a replica that hold it, which counts it in norms and saves
    it.
    """

    spec: ParameterSpec
    start: tuple[int, ...]
    shape: tuple[int, ...]
    padding: int = 0
    row: int = 0
    reduction_group: ReductionGroup | None = None
    owner: bool = True

    @property
    def name(self) -> str:
        """The parameter's."""
        return self.spec.name

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return self.spec.shape

    @property
    def rows(self) -> int:
        """Rows of the local tensor that it takes, padding included."""
        return self.shape[0] + self.padding

    @property
    def local_size(self) -> int:
        """Elements of the local tensor that it takes, padding included."""
        return self.rows * math.prod(self.shape[1:])

    def view(self, local: "Tensor") -> "Tensor":
        """The rectangle within `local`, a tensor shaped like the local parameter."""
        return local.narrow(0, self.row, self.shape[0])


@dataclass(frozen=True)
class SplitPart:
    """The part of a dimension that one tensor rank holds, and the ranks that hold the same."""

    start: int
    length: int
    padding: int
    copies: tuple[int, ...]


def split_part(split: Split, length: int, rank: int, ranks: int) -> SplitPart:
    """The part of a dimension of `length` that `rank` of `ranks` holds."""
    if split.pad_to is not None:
        rows = padded_rows(length, ranks, split.pad_to)
        start = min(rows * rank, length)
        held = min(rows, length - start)
        return SplitPart(start, held, rows - held, (rank,))
    assert split_problem(split, length, ranks) is None, (split, length, ranks)
    units = split.units or length
    width, count = length // units, max(1, units // ranks)
    copies = max(1, ranks // units)
    first = rank // copies * copies
    return SplitPart(
        start=rank * units // ranks * width,
        length=count * width,
        padding=0,
        copies=tuple(range(first, first + copies)),
    )


def split_problem(split: Split, length: int, ranks: int) -> str | None:
    """Why `ranks` can't share a dimension of `length`, in words that follow it; else None."""
    if split.pad_to is not None:
        return None
    units = split.units or length
    if length % units:
        return f"has {length:,} elements, which are not {units:,} equal units"
    if units % ranks and ranks % units:
        return f"has {units:,} {'units' if split.units else 'elements'}"
    return None


def padded_rows(length: int, ranks: int, multiple: int) -> int:
    """Rows on each rank, so that all have the same number, a multiple of `multiple`."""
    rows = -(-length // ranks)
    return -(-rows // multiple) * multiple


def shard_of(
    spec: ParameterSpec,
    *,
    tensor_rank: int,
    tensor_size: int,
    sequence_parallel: bool,
    holders: tuple[int, ...] = (0,),
    pipeline_rank: int = 0,
) -> ParameterShard:
    """The part of a parameter on a rank.

    `holders` are the pipeline ranks that hold it, the owner's first; `pipeline_rank` is one.
    """
    start, shape, padding = [0] * len(spec.shape), list(spec.shape), 0
    sharing = tuple(range(tensor_size))  # tensor ranks that hold the same rectangle
    partial = spec.partial == "always" or (spec.partial == "sequence" and sequence_parallel)
    if spec.split is not None:
        held = split_part(spec.split, spec.shape[spec.split.dim], tensor_rank, tensor_size)
        start[spec.split.dim], shape[spec.split.dim] = held.start, held.length
        padding, sharing, partial = held.padding, held.copies, True
    reduction_group: ReductionGroup = ()
    if len(holders) > 1:
        reduction_group += (("pipeline", tuple(sorted(holders))),)
    if partial and len(sharing) > 1:
        reduction_group += (("tensor", sharing),)
    return ParameterShard(
        spec,
        start=tuple(start),
        shape=tuple(shape),
        padding=padding,
        reduction_group=reduction_group or None,
        owner=tensor_rank == sharing[0] and pipeline_rank == holders[0],
    )
