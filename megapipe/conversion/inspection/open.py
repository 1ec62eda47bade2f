"""The tensors of a directory, whatever it holds: one interface for statistics and differences."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megapipe.amounts import counted, format_bytes
from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.checkpoint.summary import CheckpointSummary, TensorSummary
from megapipe.conversion.hugging_face.directory import HuggingFaceDirectory, is_hugging_face
from megapipe.conversion.inspection.difference import dtype_name
from megapipe.conversion.open import Families, open_weights
from megapipe.conversion.source import StoredTensor, TensorStore, WeightSource
from megapipe.files import shown


class SourceTensors:
    """A checkpoint or a source of weights as a TensorStore: all of its tensors, by its names."""

    def __init__(self, source: WeightSource | CheckpointReader, place: str) -> None:
        self._source, self.place = source, place
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(source.shape(name), source.dtype(name)) for name in source.names
        }

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self._source.read(name, start, shape)


def open_tensors(path: Path) -> TensorStore:
    """The tensors of a checkpoint or a Hugging Face directory, under the names that they have
    there. Raises CheckpointError or ConversionError where there are none."""
    if is_hugging_face(path):
        return HuggingFaceDirectory(path)
    return SourceTensors(open_checkpoint(path), shown(path))


def open_pair(first: Path, second: Path, families: Families) -> tuple[TensorStore, TensorStore]:
    """The tensors of two directories, to be compared: under the names that they have there, or
    under ours where one is a checkpoint and the other is another stack's."""
    if is_hugging_face(first) == is_hugging_face(second):
        return open_tensors(first), open_tensors(second)
    one, other = (open_weights(path, families) for path in (first, second))
    return SourceTensors(one, one.place), SourceTensors(other, other.place)


def summarize_other_stack(path: Path) -> CheckpointSummary | None:
    """All about a directory of another stack; None where it is none that we know.

    Raises ConversionError where it is half there or not to be trusted.
    """
    if not is_hugging_face(path):
        return None
    directory = HuggingFaceDirectory(path)
    tensors = [
        TensorSummary(name, dtype_name(one), one.shape, 1)
        for name, one in directory.tensors.items()
    ]
    dtypes = Counter(one.dtype for one in tensors)
    amounts = [f"{count} {dtype}" for dtype, count in dtypes.most_common()]
    values = sum(math.prod(one.shape) for one in tensors)
    facts = [
        ("stack", "Hugging Face"),
        ("architecture", directory.architecture or directory.model_type or "unknown"),
        ("tensors", ", ".join(amounts)),
        ("  parameters", counted(values, "value")),
        ("bytes", format_bytes(tensor_bytes(directory))),
    ]
    content: dict[str, object] = {
        "path": str(path),
        "kind": "hugging_face",
        "architecture": directory.architecture,
        "bytes": tensor_bytes(directory),
    }
    return CheckpointSummary(path, facts, tensors, [], content)


def tensor_bytes(store: TensorStore) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(one.shape) * one.dtype.itemsize for one in store.tensors.values())
