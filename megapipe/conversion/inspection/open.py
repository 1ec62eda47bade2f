"""The tensors of a directory, whatever it holds: one interface for statistics and differences."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megapipe.amounts import counted, format_bytes
from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.checkpoint.summary import CheckpointSummary, TensorSummary, describe_model
from megapipe.conversion.hugging_face.companions import check_companions
from megapipe.conversion.hugging_face.directory import HuggingFaceDirectory
from megapipe.conversion.inspection.difference import dtype_name
from megapipe.conversion.kind import OTHER_STACKS, kind_of
from megapipe.conversion.megatron.directory import MegatronCheckpoint, open_megatron
from megapipe.conversion.model_at import Families, model_at
from megapipe.conversion.open import open_weights
from megapipe.conversion.source import PlainTensorInfo, TensorStore, WeightSource
from megapipe.data.tokenizer import load_tokenizer
from megapipe.errors import ConversionError, DataError, MegapipeError
from megapipe.files import shown


class SourceTensors:
    """A checkpoint or a source of weights as a TensorStore: all of its tensors, by its names."""

    def __init__(self, source: WeightSource | CheckpointReader, place: str) -> None:
        self._source, self.place = source, place
        self.tensors: Mapping[str, PlainTensorInfo] = {
            name: PlainTensorInfo(source.shape(name), source.dtype(name)) for name in source.names
        }

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self._source.read(name, start, shape)


def open_tensors(path: Path) -> TensorStore:
    """The tensors of a checkpoint or of another stack's directory, under the names that they have
    there. Raises CheckpointError or ConversionError where there are none."""
    return _open_other(path) or SourceTensors(open_checkpoint(path), shown(path))


def open_pair(first: Path, second: Path, families: Families) -> tuple[TensorStore, TensorStore]:
    """The tensors of two directories, to be compared: under the names that they have there, or
    under ours where they are of two stacks."""
    if _stack(first) == _stack(second):
        return open_tensors(first), open_tensors(second)
    one, other = (open_weights(path, families) for path in (first, second))
    return SourceTensors(one, one.place), SourceTensors(other, other.place)


def summarize_other_stack(path: Path, families: Families) -> CheckpointSummary:
    """All about a directory of another stack, and of its model where the `families` have such a
    one.

    Raises CheckpointError or ConversionError where it is half there or not to be trusted.
    """
    store = _open_other(path)
    assert store is not None, path
    tensors = [
        TensorSummary(name, dtype_name(one), tuple(one.shape), 1)
        for name, one in store.tensors.items()
    ]
    dtypes = Counter(one.dtype for one in tensors)
    amounts = [f"{count} {dtype}" for dtype, count in dtypes.most_common()]
    values = sum(math.prod(one.shape) for one in tensors)
    known, model = _known(store), _model(path, families)
    facts = [
        *((key.replace("_", " "), str(value or "-")) for key, value in known.items()),
        ("model", model if isinstance(model, str) else describe_model(model)),
        *([("tokenizer", _tokenizer(path))] if kind_of(path) == "hugging_face" else []),
        ("tensors", ", ".join(amounts)),
        ("  values", counted(values, "value")),
        ("bytes", format_bytes(tensor_bytes(store))),
    ]
    content = {
        "path": str(path),
        "kind": _stack(path),
        **known,
        "model": {} if isinstance(model, str) else model,
        "bytes": tensor_bytes(store),
    }
    return CheckpointSummary(path, facts, tensors, [], content)


def _known(store: HuggingFaceDirectory | MegatronCheckpoint) -> dict[str, object]:
    """What a directory of another stack says of itself."""
    if isinstance(store, HuggingFaceDirectory):
        return {"stack": "Hugging Face", "architecture": store.architecture or store.model_type}
    return {
        "stack": "Megatron",
        "format": store.kind,
        "step": store.iteration,
        "optimizer_state": store.optimizer,
    }


def _model(path: Path, families: Families) -> Mapping[str, object] | str:
    """Our [model], or why there is none."""
    try:
        return model_at(path, families).model_dump(mode="json", exclude_none=True)
    except MegapipeError as error:
        return _unusable(error)


def _tokenizer(path: Path) -> str:
    if not (path / "tokenizer.json").exists() and not any(path.glob("*.model")):
        return "none: neither a tokenizer.json nor a .model file"
    try:
        check_companions(path)
        tokenizer = load_tokenizer(path, key=None)
    except (ConversionError, DataError) as error:
        return _unusable(error)
    return f"{tokenizer.path.name}, {counted(len(tokenizer.ids), 'token')}"


def _unusable(error: MegapipeError) -> str:
    """An error on one line."""
    return " ".join(f"can't be used: {error}".split())


def _open_other(path: Path) -> HuggingFaceDirectory | MegatronCheckpoint | None:
    stack = _stack(path)
    if stack == "hugging_face":
        return HuggingFaceDirectory(path)
    return open_megatron(path) if stack == "megatron" else None


def _stack(path: Path) -> str:
    """Whose directory it is; ours where nothing says otherwise."""
    kind = kind_of(path)
    return kind if kind in OTHER_STACKS else "megapipe"


def tensor_bytes(store: TensorStore) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(one.shape) * one.dtype.itemsize for one in store.tensors.values())
