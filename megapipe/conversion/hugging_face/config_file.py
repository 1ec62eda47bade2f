"""config.json of a directory of Hugging Face's, without torch. What is read is distrusted."""

import json
from pathlib import Path
from typing import Any

from megapipe.checkpoint.storage import read_small
from megapipe.errors import CheckpointError, ConversionError
from megapipe.files import shown

CONFIG = "config.json"
GENERATION = "generation_config.json"
MAX_JSON_BYTES = 32 * 2**20
MAX_DEPTH = 64


def is_hugging_face(path: Path) -> bool:
    """Whether a directory looks like one of Hugging Face's."""
    return (path / CONFIG).is_file()


class HuggingFaceConfig:
    """What the config of a directory says.

    Raises ConversionError where it is missing, damaged, or asks for code of its own.
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


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a file. Raises ConversionError where it is none, or absurdly large."""
    path = folder / name
    try:
        target = inside(folder, path)
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


def inside(folder: Path, path: Path) -> Path:
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
