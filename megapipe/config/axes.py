"""The axes along which ranks share the work: one row each, beside the keys that give their sizes.

Axes are data: mesh, data feed and gradient reduction ask what an axis splits, not what it is
called. One that splits samples is added by a row here and a key of [parallel] of the same name; one
that splits something new also needs the code that splits it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Splits(Enum):
    """What ranks that differ only in an axis have different parts of."""

    STAGES = "stages"
    SAMPLES = "samples"
    TENSORS = "tensors"


@dataclass(frozen=True)
class AxisKind:
    """An axis; `name` is also its key in [parallel]."""

    name: str
    splits: Splits


AXES = (
    AxisKind("pipeline", Splits.STAGES),
    AxisKind("data", Splits.SAMPLES),
    AxisKind("tensor", Splits.TENSORS),
)
"""Outermost first: neighbouring ranks differ in the last."""

FOLLOWS_WORLD_SIZE = "data"
"""The axis whose size may be left out of a config: it takes what the others leave."""

WORLD_SIZE = " * ".join(kind.name for kind in reversed(AXES))
"""The number of ranks in terms of keys of [parallel]: `tensor * data * pipeline`."""


def given_sizes(parallel: Mapping[str, object], *splits: Splits) -> dict[str, int]:
    """The sizes that [parallel] names, of all axes or of those that split something."""
    sizes: dict[str, int] = {}
    for kind in AXES:
        size = parallel[kind.name]
        if isinstance(size, int) and (not splits or kind.splits in splits):
            sizes[kind.name] = size
    return sizes
