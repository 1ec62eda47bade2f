"""Configs as text: they come back equal; the schema accepts what the loader accepts."""

import errno
import os
from pathlib import Path

import pytest

from megapipe.config import (
    Config,
    difference,
    dump_config,
    load_config,
    parse_config,
    save_config,
    schema,
    section_types,
)
from megapipe.errors import ConfigError, MegapipeError
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.presets import PRESETS
from tests.config.examples import TEXT, write


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_config_loads_back_equal(tmp_path: Path, preset: str) -> None:
    start = TEXT.index("[model]")
    text = f'[model]\npreset = "{preset}"\n' + TEXT[TEXT.index("[train]", start) :]
    config = load_config(write(tmp_path, text), ["--logging.wandb_name", 'ü "x" \\ \n'], FAMILIES)
    save_config(config, tmp_path / "saved.toml")
    assert load_config(tmp_path / "saved.toml", [], FAMILIES) == config
    assert parse_config((tmp_path / "saved.toml").read_text(encoding="utf-8"), FAMILIES) == config
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.toml", "saved.toml"]


def test_what_a_preset_sets_and_a_user_takes_back_stays_taken_back(tmp_path: Path) -> None:
    text = TEXT.replace("num_layers = 8", 'preset = "mistral-7b"\nnum_layers = 8')
    config = load_config(write(tmp_path, text), ["--model.sliding_window", "none"], FAMILIES)
    assert config.model.sliding_window is None
    (tmp_path / "saved.toml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "saved.toml", [], FAMILIES) == config


def test_a_saved_config_with_a_key_lost_is_refused(tmp_path: Path) -> None:
    text = TEXT.replace("num_layers = 8", 'preset = "mistral-7b"\nnum_layers = 8')
    saved = dump_config(load_config(write(tmp_path, text), [], FAMILIES))
    with pytest.raises(ConfigError, match=r"checkpoint:1: model.num_layers is missing"):
        parse_config(saved.replace("num_layers = 8\n", ""), FAMILIES, "checkpoint")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write(tmp_path), [], FAMILIES)
    target = tmp_path / "saved.toml"
    target.write_text("old", encoding="utf-8")

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(MegapipeError, match=r"saved.toml: can't be written: No space left"):
        save_config(config, target)
    assert target.read_text(encoding="utf-8") == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.toml", "saved.toml"]


def test_schema_describes_every_key() -> None:
    described = schema(FAMILIES)
    for name, kind in section_types(GPTConfig).items():
        definition = described["$defs"][kind.__name__]
        assert set(definition["properties"]) == set(kind.model_fields), name
        assert all("description" in entry for entry in definition["properties"].values()), name
        assert definition["additionalProperties"] is False
    assert "model" not in described["required"]
    written, loaded = described["anyOf"]
    preset, keys = written["properties"]["model"]["anyOf"]
    assert (written["required"], preset["required"]) == (["model"], ["preset"])
    assert {"num_layers", "num_heads"} <= set(keys["required"])
    assert loaded["properties"] == {"checkpoint": {"required": ["load_from"]}}
    window = described["$defs"]["GPTConfig"]["properties"]["sliding_window"]
    assert {"const": "none", "type": "string"} in window["anyOf"]


def test_difference_names_keys_of_the_shape(tmp_path: Path) -> None:
    old = load_config(write(tmp_path), [], FAMILIES)
    changed = {
        "model.hidden_size": "128",
        "model.sliding_window": "4",
        "model.dropout": "0.1",
        "model.head_dim": "8",
        "train.steps": "7",
    }
    new = load_config(
        write(tmp_path), [f"--{key}={value}" for key, value in changed.items()], FAMILIES
    )
    assert difference(old, old) == []
    assert difference(old, new) == [
        "model.hidden_size: 64 -> 128",
        "model.ffn_hidden_size: 256 -> 512",
        "model.sliding_window: none -> 4",
    ]
    assert difference(old, new, sections=("train",)) == ["train.steps: 100 -> 7"]


def test_difference_names_the_entry_of_a_list(tmp_path: Path) -> None:
    old = load_config(write(tmp_path), [], FAMILIES)
    (source,) = old.data.sources
    words = ["--data.sources.0.weight=2", "--data.sources.1={name='b', path='more.txt'}"]
    new = load_config(write(tmp_path), words, FAMILIES)
    added = 'name = "b", path = "more.txt", weight = 1.0, max_epochs = none, after_max_ep...'
    assert difference(old, new, sections=("data",)) == [
        f"data.sources[0].weight: {source.weight} -> 2.0",
        f"data.sources[1]: none -> {{{added}",
    ]


def test_every_key_has_a_description() -> None:
    for name, kind in section_types(GPTConfig).items():
        for key, field in kind.model_fields.items():
            assert field.description, f"{name}.{key}"
    assert all(field.description for field in Config.model_fields.values())
