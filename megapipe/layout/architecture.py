"""How another stack describes and stores a model of a family of ours. No torch.

A model family brings its architectures: for each a table that says which rows of the other stack's
tensors are which rows of our parameters, and how the two configs translate. Both directions of a
conversion read the same table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megapipe.config import ModelConfig
from megapipe.layout.parameters import ParameterSpec

Stack = Literal["hugging_face", "megatron"]


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + rows) of our parameter, which are rows [row, row + rows) of a tensor of
    the other stack. Each row is whole."""

    parameter: str
    start: int
    rows: int
    row: int


@dataclass(frozen=True)
class ForeignTensor:
    """One tensor of the other stack.

    shape: as it is stored there; with `transposed` that is [in, out] for a matrix that is
    [out, in] here, and rows are counted after turning it.
    pieces: what its rows are, without overlap, first to last.
    padded: any number of rows may lie behind those, which the other stack has for speed: zeros
    when written, and not looked at when read.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool = False
    padded: bool = False

    @property
    def turned_shape(self) -> tuple[int, ...]:
        """The shape with our order of dimensions."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


class Architecture(Protocol):
    """A kind of model as another stack has it, such as LlamaForCausalLM of Hugging Face.

    Its functions are pure.
    """

    @property
    def name(self) -> str:
        """The other stack's name for it."""

    @property
    def model_type(self) -> str:
        """What its config calls the kind of model."""

    @property
    def stack(self) -> Stack:
        """Whose it is."""

    @property
    def ignored(self) -> Sequence[str]:
        """Patterns (as of fnmatch) of names of tensors that are stored and are no weights: masks,
        tables of frequencies."""

    @property
    def prefix(self) -> str:
        """What the names of all tensors begin with but the output layer's. A model that was saved
        without its output layer lacks it."""

    def read_config(self, values: Mapping[str, object]) -> ModelConfig:
        """Our [model] for the other stack's config.

        Raises ConversionError that lists every key whose value asks for what we don't compute.
        """

    def write_config(self, model: ModelConfig) -> dict[str, object]:
        """The other stack's config for our [model], without what is about tokens.

        Raises ConversionError that lists what it has no way to say.
        """

    def tensors(self, model: ModelConfig) -> Sequence[ForeignTensor]:
        """The table: all tensors of the model, roughly in the order in which it applies them."""

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """Names under which a tensor may be stored a second time, and which one it is."""


def whole(parameter: ParameterSpec, name: str, *, transposed: bool = False) -> ForeignTensor:
    """A tensor that is one parameter of ours."""
    shape = parameter.shape[::-1] if transposed else parameter.shape
    piece = Piece(parameter.name, 0, parameter.shape[0], 0)
    return ForeignTensor(name, shape, (piece,), transposed)


def stacked(
    parameters: Sequence[ParameterSpec], name: str, *, transposed: bool = False
) -> ForeignTensor:
    """A tensor whose rows are those of several parameters of ours, one after the other."""
    pieces, row = [], 0
    for parameter in parameters:
        pieces.append(Piece(parameter.name, 0, parameter.shape[0], row))
        row += parameter.shape[0]
    shape = (row, *parameters[0].shape[1:])
    return ForeignTensor(name, shape[::-1] if transposed else shape, tuple(pieces), transposed)
