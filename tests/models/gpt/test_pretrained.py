"""The section [model] of a checkpoint, whatever its family."""

import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
import tomli_w
import torch

from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.save import save_checkpoint
from megapipe.config import dump_config, load_config
from megapipe.conversion.open import model_of
from megapipe.errors import CheckpointError, DataError
from megapipe.models import load_pretrained
from megapipe.models.families import FAMILIES
from megapipe.models.gpt import pretrained
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.pretrained import PretrainedGPT
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


@pytest.mark.parametrize(
    ("position", "tokens", "said"),
    [
        ("rope", [[0, 600]], r"token 600 is none of the model's, which are 0 to 30 \("),
        ("rope", [[-1, 600]], "token -1 is none of the model's"),
        ("rope", [[0] * 20], None),
        ("learned", [[0] * 20], r"20 tokens are more than .* 16 \(model\.max_sequence_length\)"),
    ],
)
def test_what_a_model_has_no_embedding_for(
    position: str, tokens: list[list[int]], said: str | None
) -> None:
    model = GPTConfig(
        num_layers=1,
        hidden_size=8,
        num_heads=2,
        vocab_size=31,
        max_sequence_length=16,
        position=position,
    )
    module = PretrainedGPT(model, torch.float32, torch.device("cpu"))
    with pytest.raises(DataError, match=said) if said else nullcontext():
        module(torch.tensor(tokens))


def test_positions_that_caches_have_taken() -> None:
    model = GPTConfig(
        num_layers=1,
        hidden_size=8,
        num_heads=2,
        vocab_size=31,
        max_sequence_length=16,
        position="learned",
    )
    module = PretrainedGPT(model, torch.float32, torch.device("cpu"))
    caches = module.new_caches()
    module(torch.zeros(1, 16, dtype=torch.long), caches)
    with pytest.raises(DataError, match="17 tokens are more than"):
        module(torch.zeros(1, 1, dtype=torch.long), caches)
