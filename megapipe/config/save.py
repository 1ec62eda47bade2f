"""A config as text: TOML that loads back to an equal config, and a JSON schema for editors."""

from pathlib import Path
from typing import Any

import tomli_w

from megapipe.config.config import Config
from megapipe.config.optimizer import AnyOptimizerConfig
from megapipe.errors import MegapipeError
from megapipe.files import replace_durably, write_reason


def dump_config(config: Config) -> str:
    """TOML with every value spelled out; `parse_config` and `load_config` give an equal config."""
    tree = {name: _plain(section) for name, section in config.model_dump(mode="json").items()}
    # What a preset would set is written even where it is absent, or the preset would set it again.
    for key in ("rope_scaling", "sliding_window"):
        if config.model.preset is not None:
            tree["model"].setdefault(key, "none")
    return tomli_w.dumps(tree)


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


def schema() -> dict[str, Any]:
    """JSON schema of the config file, for completion and checks in editors."""
    described = Config.model_json_schema()
    described["$defs"]["OptimizerConfig"] = AnyOptimizerConfig.model_json_schema()
    # A preset may give the keys that have no default.
    shape = described["$defs"]["ModelConfig"]
    shape["anyOf"] = [{"required": ["preset"]}, {"required": shape.pop("required")}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **described,
        "title": "megapipe config",
    }
