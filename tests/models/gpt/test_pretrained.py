"""The section [model] of a checkpoint, whatever its family."""

import tomllib
from pathlib import Path

import pytest
import tomli_w

from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.save import save_checkpoint
from megapipe.config import dump_config, load_config
from megapipe.conversion.open import model_of
from megapipe.errors import CheckpointError
from megapipe.models import load_pretrained
from megapipe.models.families import FAMILIES
from megapipe.models.gpt import pretrained
from tests.config.convolution import BOTH
from tests.config.examples import TEXT, write

CONVOLUTION = 'family = "convolution"\npreset = "wide"\n'


def save(folder: Path, config: str) -> Path:
    files = {"config.toml": config.encode()}
    return save_checkpoint(folder / "checkpoints", 1, [], state={}, files=files)


def test_a_checkpoint_that_names_no_family_is_gpt(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), [], FAMILIES)
    tree = tomllib.loads(dump_config(config))
    assert tree["model"].pop("family") == "gpt"
    path = save(tmp_path, tomli_w.dumps(tree))
    assert model_of(open_checkpoint(path), FAMILIES) == config.model


def test_the_family_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"[model]\n{CONVOLUTION}" + TEXT[TEXT.index("[parallel]") :]
    config = load_config(write(tmp_path, text), [], BOTH)
    path = save(tmp_path, dump_config(config))
    with pytest.raises(CheckpointError, match=r'step-00000001: model\.family = "convolution" does'):
        model_of(open_checkpoint(path), FAMILIES)
    monkeypatch.setattr(pretrained, "FAMILIES", BOTH)
    assert model_of(open_checkpoint(path), pretrained.FAMILIES) == config.model
    with pytest.raises(CheckpointError, match=r'model\.family = "convolution", and only "gpt" can'):
        load_pretrained(path)
