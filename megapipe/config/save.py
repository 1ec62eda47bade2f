"""A config as text: TOML that loads back to an equal config, and a JSON schema for editors."""

from pathlib import Path
from typing import Any

import tomli_w

from megapipe.config.config import Config
from megapipe.config.family import Families
from megapipe.config.model import DEFAULT_FAMILY, ModelConfig
from megapipe.config.optimizer import AnyOptimizerConfig
from megapipe.errors import MegapipeError
from megapipe.files import replace_durably, write_reason

_PART = "#/$defs/{model}"


def dump_config(config: Config) -> str:
    """TOML with every value spelled out; `parse_config` and `load_config` give an equal config."""
    tree = {name: _plain(section) for name, section in config.model_dump(mode="json").items()}
    # What is absent is written too where a preset or another model would set it again.
    if config.model.preset is not None or config.checkpoint.load_from is not None:
        absent = [key for key, value in config.model if value is None and key != "preset"]
        tree["model"] |= dict.fromkeys(absent, "none")
    return tomli_w.dumps(tree)


def dump_model(model: ModelConfig) -> str:
    """TOML of the section [model] alone, with every value spelled out but the preset's name."""
    values = model.model_dump(mode="json", exclude={"preset"})
    return tomli_w.dumps({"model": _plain(values)})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def save_config(config: Config, path: str | Path) -> None:
    """Writes `dump_config` as `write_text` does."""
    write_text(dump_config(config), path)


def write_text(text: str, path: str | Path) -> None:
    """Writes a file in one step, so that nobody finds half of it, not even after a crash.

    Raises MegapipeError where the disk is full or the directory can't be written.
    """
    try:
        replace_durably(Path(path), [text.encode()])
    except OSError as error:
        raise MegapipeError(
            f"{path}: can't be written: {write_reason(error)} Or write to another directory "
            "(train.run_dir)."
        ) from error


def schema(families: Families) -> dict[str, Any]:
    """JSON schema of the config file, for completion and checks in editors.

    [model] is one of the families': the default one's, or another's that `family` names.
    [optimizer] has the keys of all optimizers.
    """
    described = Config.model_json_schema()
    parts = described["$defs"]
    del parts["ModelConfig"]
    parts["OptimizerConfig"] = AnyOptimizerConfig.model_json_schema()
    shapes, needed = [], [{"required": ["preset"]}]
    for name, family in families.items():
        shape = family.config.model_json_schema(ref_template=_PART)
        parts |= shape.pop("$defs", {})
        needed.append({"required": shape.pop("required")})
        if name != DEFAULT_FAMILY:
            shape["required"] = ["family"]
        parts[family.config.__name__] = shape
        shapes.append({"$ref": _PART.format(model=family.config.__name__)})
    described["properties"]["model"] = {
        "description": Config.model_fields["model"].description,
        **(shapes[0] if len(shapes) == 1 else {"anyOf": shapes}),
    }
    # A preset may give the keys that have no default, and so may a model that is loaded.
    described["required"].remove("model")
    described["anyOf"] = [
        {"required": ["model"], "properties": {"model": {"anyOf": needed}}},
        {"required": ["checkpoint"], "properties": {"checkpoint": {"required": ["load_from"]}}},
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **described,
        "title": "megapipe config",
    }
