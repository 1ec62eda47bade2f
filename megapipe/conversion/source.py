"""Weights under our names, whatever they are stored as."""

import fnmatch
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megapipe.amounts import counted
from megapipe.checkpoint.load import CheckpointReader
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.config import ModelConfig
from megapipe.errors import ConversionError
from megapipe.files import shown
from megapipe.layout.architecture import Architecture, ForeignTensor, Piece
from megapipe.layout.parameters import ParameterSpec

COMPARED_AT_ONCE = 4 * 2**20
"""Values of two tensors that should be the same."""
MAX_NAMES = 10
"""How many names a message lists."""


class WeightSource(Protocol):
    """The weights of a whole model, read by rectangles of our parameters."""

    @property
    def place(self) -> str:
        """Where they lie, for messages."""

    @property
    def model(self) -> ModelConfig:
        """The shape of the model."""

    @property
    def names(self) -> Sequence[str]:
        """Parameters that there are."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole parameter's."""

    def dtype(self, name: str) -> torch.dtype:
        """What it is stored as."""

    def read(
        self,
        name: str,
        start: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Rectangle [start, start + shape) of a parameter (all of it by default), on the CPU; as it
        is stored, or rounded to `dtype`."""


class CheckpointWeights:
    """The weights of a checkpoint of ours, those of training or weights alone."""

    def __init__(self, reader: CheckpointReader, model: ModelConfig) -> None:
        self.reader, self.model = reader, model
        self.place = shown(reader.path)
        kind = "weights/"
        self.names = [name[len(kind) :] for name in reader.names if name.startswith(kind)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reader.shape(f"weights/{name}")

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(f"weights/{name}")

    def read(
        self,
        name: str,
        start: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        return self.reader.read(f"weights/{name}", start, shape, dtype)


class TensorInfo(Protocol):
    """What a stored tensor is like."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class PlainTensorInfo:
    """The plainest `TensorInfo`."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorStore(Protocol):
    """The tensors of another stack's directory, under its own names."""

    @property
    def place(self) -> str:
        """Where they lie, for messages."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All that are there."""

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Rectangle [start, start + shape) of a tensor, on the CPU, as it is stored."""


@dataclass(frozen=True)
class _Holder:
    """A piece of a parameter, and the tensor that holds it under its stored name."""

    tensor: ForeignTensor
    stored: str
    piece: Piece


class ForeignWeights:
    """Another stack's tensors read as our parameters, through the table of an architecture.

    Raises ConversionError where tensors are missing, left over, or of another shape. Parameters of
    ours that may be missing, and tensors that may be left over, are named by the patterns `allow`;
    `missing` and `unused` are those that are.
    """

    def __init__(
        self,
        store: TensorStore,
        architecture: Architecture,
        model: ModelConfig,
        parameters: Sequence[ParameterSpec],
        allow: Sequence[str] = (),
    ) -> None:
        self.store, self.model = store, model
        self.place = store.place
        self._specs = {spec.name: spec for spec in parameters}
        if model.num_layers > len(store.tensors):
            raise ConversionError(
                f"{store.place} has {model.num_layers:,} layers by its config, and "
                f"{counted(len(store.tensors), 'tensor')}"
            )
        table = architecture.tensors(model)
        prefix = _missing_prefix(store, architecture, table)
        stored = {tensor.name: tensor.name.removeprefix(prefix) for tensor in table}
        self.missing, self.unused = _check_tensors(store, architecture, model, table, prefix, allow)
        self.names = [name for name in self._specs if name not in self.missing]
        self._holders: dict[str, list[_Holder]] = defaultdict(list)
        for tensor in table:
            for piece in tensor.pieces:
                holder = _Holder(tensor, stored[tensor.name], piece)
                self._holders[piece.parameter].append(holder)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.store.tensors[self._holders[name][0].stored].dtype

    def read(
        self,
        name: str,
        start: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        whole = Rectangle.whole(self.shape(name))
        target = whole if start is None or shape is None else Rectangle(tuple(start), tuple(shape))
        assert whole.contains(target), (name, target)
        parts = []
        for holder in self._holders[name]:
            piece = holder.piece
            held = Rectangle((piece.start, *whole.start[1:]), (piece.rows, *whole.shape[1:]))
            part = held.intersection(target)
            if part is not None:
                parts.append((part, self._read_piece(holder, part)))
        if len(parts) == 1 and parts[0][0] == target:
            return parts[0][1].to(dtype or self.dtype(name))
        result = torch.empty(target.shape, dtype=dtype or self.dtype(name))
        for part, values in parts:
            result[part.slices(target)] = values
        return result

    def _read_piece(self, holder: _Holder, part: Rectangle) -> Tensor:
        """The values of `part`, a rectangle of the parameter within the piece."""
        row = holder.piece.row + part.start[0] - holder.piece.start
        start, shape = (row, *part.start[1:]), part.shape
        if not holder.tensor.transposed:
            return self.store.read(holder.stored, start, shape)
        return self.store.read(holder.stored, start[::-1], shape[::-1]).t()


def _missing_prefix(
    store: TensorStore, architecture: Architecture, table: Sequence[ForeignTensor]
) -> str:
    """What the stored names lack at their beginning: the architecture's prefix, or nothing."""
    prefixed = [one.name for one in table if one.name.startswith(architecture.prefix)]
    bare = [name.removeprefix(architecture.prefix) for name in prefixed]
    if not any(name in store.tensors for name in prefixed):
        return architecture.prefix if any(name in store.tensors for name in bare) else ""
    return ""


def _check_tensors(
    store: TensorStore,
    architecture: Architecture,
    model: ModelConfig,
    table: Sequence[ForeignTensor],
    prefix: str,
    allow: Sequence[str],
) -> tuple[list[str], list[str]]:
    """The parameters that are missing and the tensors that are left over, as far as that is
    allowed. Raises ConversionError that lists the others, and tensors of another shape."""
    expected = {tensor.name.removeprefix(prefix): tensor for tensor in table}
    copies = {
        copy.removeprefix(prefix): of.removeprefix(prefix)
        for copy, of in architecture.copies(model).items()
    }
    problems, missing, unused = [], dict[str, None](), []
    for name, tensor in expected.items():
        found = store.tensors.get(name)
        parameters = list(dict.fromkeys(piece.parameter for piece in tensor.pieces))
        if found is None and parameters and all(_matches(one, allow) for one in parameters):
            missing |= dict.fromkeys(parameters)
        elif found is None:
            problems.append(f"{name} is missing ({', '.join(parameters)} here)")
        elif not _fits(found.shape, tensor):
            problems.append(
                f"{name} has shape {list(found.shape)}; by the config it is {list(tensor.shape)}"
            )
        elif not found.dtype.is_floating_point:
            problems.append(f"{name} is stored as {found.dtype}, which weights are not")
    for name in store.tensors.keys() - expected.keys():
        if name in copies:
            problems += _differing_copy(store, name, copies[name])
        elif _matches(name, allow):
            unused.append(name)
        elif not _matches(name, architecture.ignored):
            problems.append(f"{shown(name[:200])} is no tensor of {architecture.name}")
    if problems:
        lines = sorted(problems)[:MAX_NAMES]
        if len(problems) > MAX_NAMES:
            lines.append(f"and {len(problems) - MAX_NAMES:,} more")
        raise ConversionError(
            "\n  ".join([f"{store.place}: its tensors don't fit its config:", *lines])
        )
    return [*missing], sorted(unused)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _fits(shape: tuple[int, ...], tensor: ForeignTensor) -> bool:
    """Whether a stored tensor of that shape can be `tensor`: the same, or padded behind."""
    if tensor.padded:
        return shape[1:] == tensor.shape[1:] and shape[:1] >= tensor.shape[:1]
    return shape == tensor.shape


def _differing_copy(store: TensorStore, name: str, of: str) -> list[str]:
    """A problem where a tensor that is stored twice has two values."""
    one, other = store.tensors[name], store.tensors.get(of)
    if other is None or len(other.shape) != 2:
        return []  # which is reported as missing, or of another shape
    rows, width = other.shape
    step = max(1, COMPARED_AT_ONCE // max(1, width))
    same = (one.shape, one.dtype) == (other.shape, other.dtype) and all(
        torch.equal(
            store.read(name, (at, 0), (min(step, rows - at), width)),
            store.read(of, (at, 0), (min(step, rows - at), width)),
        )
        for at in range(0, rows, step)
    )
    if same:
        return []
    return [
        f"{name} differs from {of}, and the config ties them (tie_word_embeddings = true): set "
        "that to false in config.json if they are two"
    ]
