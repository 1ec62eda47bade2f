"""Reading a directory of Hugging Face's. What is read is distrusted, and nothing in it is run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from megapipe.checkpoint.storage import open_regular, read_small
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
MAX_JSON_BYTES = 32 * 2**20
MAX_DEPTH = 64


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
        owners = self._index() if len(files) > 1 or files[0] != SINGLE else {}
        for file in files:
            path = self.path / file
            with _opened(self.path, path) as descriptor:
                header = read_header(descriptor, path)
            for name, found in header.items():
                if name in places:
                    raise ConversionError(f"{self.place}: {shown(name)} is in two of its files")
                if owners and owners.get(name) != file:
                    raise ConversionError(
                        f"{self.place}/{file} holds {shown(name)}, which {INDEX} puts "
                        f"{'elsewhere' if name in owners else 'nowhere'}: the files are of "
                        "different models"
                    )
                places[name] = _Place(path, found)
        missing = [name for name in owners if name not in places]
        if missing:
            raise ConversionError(
                f"{self.place}/{owners[missing[0]]} lacks {shown(missing[0])}, which {INDEX} puts "
                "there: the files are of different models"
            )
        return places

    def _weight_files(self) -> list[str]:
        if (self.path / INDEX).exists():
            files = sorted(set(self._index().values()))
            gone = [file for file in files if not (self.path / file).exists()]
            if gone:
                raise ConversionError(
                    f"{self.place} has {len(files) - len(gone)} of the {len(files)} files of its "
                    f"weights ({gone[0]} is not there): download it again, to the end"
                )
            return files
        if (self.path / SINGLE).exists():
            return [SINGLE]
        others = [name for name in OTHER_FORMATS if (self.path / name).exists()]
        if others:
            raise ConversionError(
                f"{self.place} has its weights as {others[0]}, which is not read. Take the "
                f"model's {SINGLE}, or write one with transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
            )
        raise ConversionError(
            f"{self.place} has a {CONFIG} and no weights: neither {SINGLE} nor {INDEX} is there. "
            "Download them too."
        )

    def _index(self) -> dict[str, str]:
        """The file of each tensor, by the index."""
        table = read_json(self.path, INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ConversionError(f"{self.place}/{INDEX} has no table weight_map")
        for name, file in table.items():
            plain = isinstance(file, str) and Path(file).name == file and file not in ("", "..")
            if not plain or not file.endswith(".safetensors"):
                raise ConversionError(
                    f"{self.place}/{INDEX}: {shown(name)[:100]} is in {shown(str(file))[:100]!r}, "
                    "which is not a name of a safetensors file in the same directory"
                )
        return table


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a file. Raises ConversionError where it is none, or absurdly large."""
    path = folder / name
    try:
        target = _inside(folder, path)
        value = json.loads(read_small(target, MAX_JSON_BYTES))
        nested = _depth(value)
    except FileNotFoundError:
        raise ConversionError(f"{shown(path)} is missing") from None
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    except (ValueError, RecursionError):
        raise ConversionError(f"{shown(path)} is not JSON: download it again") from None
    if nested > MAX_DEPTH or not isinstance(value, dict):
        raise ConversionError(f"{shown(path)} is not a JSON object as models have it")
    return value


def _depth(value: object) -> int:
    """How deep lists and tables are nested."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


@contextmanager
def _opened(folder: Path, path: Path) -> Iterator[int]:
    try:
        with open_regular(_inside(folder, path)) as descriptor:
            yield descriptor
    except CheckpointError as error:
        raise ConversionError(str(error)) from error


def _inside(folder: Path, path: Path) -> Path:
    """The file that `path` leads to. Links may lead to the same directory, or as in the hub's cache
    from snapshots/REVISION/ to blobs/. Raises ConversionError for others."""
    if not path.is_symlink():
        return path
    target, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if target.parent not in allowed:
        raise ConversionError(
            f"{shown(path)} is a link out of its directory, to {shown(target)}: replace it by the "
            "file"
        )
    return target
