"""Reading a directory of Hugging Face's. What is read is distrusted, and nothing in it is run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from megapipe.checkpoint.storage import open_regular, read_small
from megapipe.conversion.foreign_json import MAX_BYTES, parse_json
from megapipe.conversion.hugging_face.header import TensorRange, read_header
from megapipe.conversion.source import StoredTensor
from megapipe.conversion.strided import read_rectangle
from megapipe.errors import CheckpointError, ConversionError
from megapipe.files import shown

CONFIG = "config.json"
GENERATION = "generation_config.json"
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
ADAPTER = "adapter_config.json"
MAX_NAME_BYTES = 255
MAX_TENSORS = 50_000
"""More than any model has whose every tensor is a matrix of a layer."""


def is_hugging_face(path: Path) -> bool:
    """Whether a directory looks like one of Hugging Face's."""
    return (path / CONFIG).is_file()


@dataclass(frozen=True)
class _Place:
    """A tensor's file and where in it."""

    file: Path
    range: TensorRange


class HuggingFaceDirectory:
    """config.json and the tensors of the safetensors files beside it.

    Raises ConversionError for what is missing, half there, or not to be trusted.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, shown(path)
        self.config = read_json(path, CONFIG)
        self._refuse_code()
        if os.path.lexists(path / ADAPTER):
            raise ConversionError(
                f"{self.place} holds an adapter ({ADAPTER}), which is no whole model. Merge it "
                "into its model first (peft: merge_and_unload), or remove it, if it is a leftover."
            )

    def _refuse_code(self) -> None:
        for key, why in (
            ("auto_map", "names code of its own, and none from a model's directory is run"),
            ("quantization_config", "says that the weights are quantised, which are not read"),
            ("compression_config", "says that the weights are compressed, which are not read"),
        ):
            if self.config.get(key):
                raise ConversionError(
                    f"{self.place}/{CONFIG}: {key} {why}. Take the original weights (or remove the "
                    "key, if it is a leftover)."
                )

    @property
    def architecture(self) -> str | None:
        """The name of its architecture, by `architectures` of the config."""
        names = self.config.get("architectures")
        if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
            return names[0]
        return None

    @property
    def model_type(self) -> str | None:
        """`model_type` of the config."""
        kind = self.config.get("model_type")
        return kind if isinstance(kind, str) else None

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors of all files."""
        return {
            name: StoredTensor(place.range.shape, place.range.dtype)
            for name, place in self._places.items()
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(place.range.bytes for place in self._places.values())

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        place = self._places[name]
        with _opened(self.path, place.file) as descriptor:
            return read_rectangle(
                descriptor,
                place.file,
                offset=place.range.offset,
                whole=place.range.shape,
                dtype=place.range.dtype,
                start=start,
                shape=shape,
            )

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


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a file. Raises ConversionError where it is none, or absurdly large."""
    path = folder / name
    try:
        value = parse_json(read_small(inside(folder, path), MAX_BYTES))
    except FileNotFoundError:
        raise ConversionError(f"{shown(path)} is missing") from None
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    except ValueError as error:
        raise ConversionError(f"{shown(path)} {error}: download it again") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{shown(path)} is not a JSON object as models have it")
    return value


@contextmanager
def _opened(folder: Path, path: Path) -> Iterator[int]:
    try:
        with open_regular(inside(folder, path)) as descriptor:
            yield descriptor
    except CheckpointError as error:
        raise ConversionError(str(error)) from error


def inside(folder: Path, path: Path) -> Path:
    """The file that `path` leads to. Links may lead to the same directory, or as in the hub's cache
    from snapshots/REVISION/ to blobs/. Raises ConversionError for others."""
    if not path.is_symlink():
        return path
    try:
        target, home = path.resolve(), folder.resolve()
    except RuntimeError:  # what Python up to 3.12 raises where links lead in a circle
        raise ConversionError(f"{shown(path)} is a link that leads to itself: remove it") from None
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if target.parent not in allowed:
        raise ConversionError(
            f"{shown(path)} is a link out of its directory, to {shown(target)}: replace it by the "
            "file"
        )
    return target
