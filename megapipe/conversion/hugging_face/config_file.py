"""config.json of a directory of Hugging Face's, without torch. What is read is distrusted."""

import os
from pathlib import Path
from typing import Any

from megapipe.checkpoint.storage import read_small
from megapipe.conversion.foreign_json import MAX_BYTES, parse_json
from megapipe.conversion.kind import HUGGING_FACE_CONFIG as CONFIG
from megapipe.errors import CheckpointError, ConversionError
from megapipe.files import shown

GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"


class HuggingFaceConfig:
    """What the config of a directory says.

    Raises ConversionError where it is missing, damaged, or asks for code of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, shown(path)
        self.config = read_json(path, CONFIG)
        self._refuse_code()

    def _refuse_code(self) -> None:
        if os.path.lexists(self.path / ADAPTER):
            raise ConversionError(
                f"{self.place} holds an adapter ({ADAPTER}), which is no whole model. Merge it "
                "into its model first (peft: merge_and_unload), or remove it, if it is a leftover."
            )
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
