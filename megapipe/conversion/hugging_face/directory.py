"""Reading a directory of Hugging Face's. What is read is distrusted, and nothing in it is run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megapipe.checkpoint.storage import open_regular
from megapipe.conversion.hugging_face.config_file import (
    CONFIG,
    HuggingFaceConfig,
    inside,
    read_json,
)
from megapipe.conversion.hugging_face.header import TensorRange, read_header
from megapipe.conversion.source import PlainTensorInfo
from megapipe.conversion.strided import StridedTensor
from megapipe.errors import CheckpointError, ConversionError
from megapipe.files import shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_FORMATS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.ckpt.index",
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "consolidated.00.pth",
)
"""Weights that are not read, by the names that they usually have."""
MAX_NAME_BYTES = 255
MAX_TENSORS = 50_000
"""More than any model has whose every tensor is a matrix of a layer."""


@dataclass(frozen=True)
class _Place:
    """A tensor's file and where in it."""

    file: Path
    range: TensorRange


class HuggingFaceDirectory(HuggingFaceConfig):
    """config.json and the tensors of the safetensors files beside it.

    Raises ConversionError for what is missing, half there, or not to be trusted.
    """

    @cached_property
    def tensors(self) -> Mapping[str, PlainTensorInfo]:
        """All tensors of all files."""
        return {
            name: PlainTensorInfo(place.range.shape, place.range.dtype)
            for name, place in self._places.items()
        }

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        place = self._places[name]
        found = place.range
        whole = StridedTensor.row_major(place.file, found.offset, found.dtype, found.shape)
        result = torch.empty(tuple(shape), dtype=found.dtype)
        with _opened(self.path, place.file) as descriptor:
            whole.part(start, shape).read_from(descriptor, result)
        return result

    @cached_property
    def _places(self) -> Mapping[str, _Place]:
        files = self._weight_files()
        places: dict[str, _Place] = {}
        owners = self._index if files != [SINGLE] else {}
        for file in files:
            path = self.path / file
            with _opened(self.path, path) as descriptor:
                header = read_header(descriptor, path)
            for name, found in header.items():
                if owners and owners.get(name) != file:
                    where = "elsewhere" if name in owners else "nowhere"
                    raise ConversionError(
                        f"{shown(path)} holds {_name(name)}, which {INDEX} puts {where}: the files "
                        "are of different models"
                    )
                places[name] = _Place(path, found)
            if len(places) > MAX_TENSORS:
                raise ConversionError(f"{self.place} has more than {MAX_TENSORS:,} tensors")
        missing = [name for name in owners if name not in places]
        if missing:
            raise ConversionError(
                f"{self.place}/{shown(owners[missing[0]])} lacks {_name(missing[0])}, which "
                f"{INDEX} puts there: the files are of different models"
            )
        return places

    def _weight_files(self) -> list[str]:
        single = os.path.lexists(self.path / SINGLE)
        if os.path.lexists(self.path / INDEX):
            files = sorted(set(self._index.values()))
            if single and files != [SINGLE]:
                raise ConversionError(
                    f"{self.place} has both {SINGLE} and {INDEX}, which names other files: remove "
                    "the one that is not meant"
                )
            gone = [file for file in files if not (self.path / file).exists()]
            if gone:
                raise ConversionError(
                    f"{self.place} has {len(files) - len(gone)} of the {len(files)} files of its "
                    f"weights ({shown(gone[0])} is not there): download it again, to the end"
                )
            return files
        if single:
            return [SINGLE]
        others = [name for name in OTHER_FORMATS if (self.path / name).exists()]
        others += sorted(path.name for path in self.path.glob("*.gguf"))
        if others:
            raise ConversionError(
                f"{self.place} has its weights as {shown(others[0])}, which is not read. Take the "
                f"model's {SINGLE}, or write one with transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
            )
        raise ConversionError(
            f"{self.place} has a {CONFIG} and no weights: neither {SINGLE} nor {INDEX} is there. "
            "Download them too."
        )

    @cached_property
    def _index(self) -> dict[str, str]:
        """The file of each tensor, by the index."""
        table = read_json(self.path, INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ConversionError(f"{self.place}/{INDEX} has no table weight_map")
        for name, file in table.items():
            if not isinstance(file, str) or not _is_plain(file):
                raise ConversionError(
                    f"{self.place}/{INDEX}: {_name(name)} is in {shown(str(file))[:100]!r}, "
                    "which is not a name of a safetensors file in the same directory"
                )
        return table


def _is_plain(file: str) -> bool:
    """Whether a text is the name of a safetensors file, and no path."""
    size = len(file.encode(errors="replace"))
    return file.endswith(".safetensors") and size <= MAX_NAME_BYTES and not {"/", "\0"} & set(file)


def _name(tensor: str) -> str:
    """A tensor's name for messages."""
    return shown(tensor[:200])


@contextmanager
def _opened(folder: Path, path: Path) -> Iterator[int]:
    try:
        with open_regular(inside(folder, path)) as descriptor:
            yield descriptor
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
