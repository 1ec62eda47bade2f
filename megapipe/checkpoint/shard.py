"""What a rank hands over to be saved: rectangles of global tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megapipe.checkpoint.manifest import ITEM_BYTES
from megapipe.checkpoint.rectangle import Rectangle

TORCH_DTYPES = {
    "float64": torch.float64,
    "int64": torch.int64,
    "float32": torch.float32,
    "int32": torch.int32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
assert TORCH_DTYPES.keys() == ITEM_BYTES.keys()


@dataclass(frozen=True)
class Shard:
    """`tensor` holds the rectangle [start, start + tensor.shape) of the global tensor `name`.

    Each rectangle is handed over by exactly one rank (the one that owns it). The
    tensor may be on any device and need not be contiguous. A name is what the values are, a slash,
    and the global name of the parameter: `exp_avg/layers.0.mlp.up.weight`.

    With `load`, `tensor` is on the meta device and gives shape and dtype alone. `load()` is called
    once, perhaps by another thread, just before the values are written, and they are let go after
    that: so a process that holds a tensor or two at a time can save a model of any size.
    """

    name: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    tensor: Tensor
    load: Callable[[], Tensor] | None = None

    @property
    def rectangle(self) -> Rectangle:
        return Rectangle(tuple(self.start), tuple(self.tensor.shape))

    def values(self) -> Tensor:
        """The values: `tensor`, or what `load` returns, which has to be of its shape and dtype."""
        if self.load is None:
            return self.tensor
        values, promised = self.load(), self.tensor
        assert (values.shape, values.dtype) == (promised.shape, promised.dtype), self.name
        return values


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous CPU tensor as uint8 [bytes], without a copy."""
    return tensor.reshape(-1).view(torch.uint8)
