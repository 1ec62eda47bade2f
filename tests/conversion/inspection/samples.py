"""Tensors in memory as a directory would have them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from megapipe.checkpoint.rectangle import Rectangle
from megapipe.conversion.source import PlainTensorInfo


class Tensors:
    """A TensorStore of tensors in memory."""

    place = "memory"

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values
        self.tensors = {
            name: PlainTensorInfo(tuple(one.shape), one.dtype) for name, one in values.items()
        }

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        whole = Rectangle.whole(self.tensors[name].shape)
        return self._values[name][Rectangle(tuple(start), tuple(shape)).slices(whole)]
