"""Exports that a run can't make are refused before it begins, with what a run can do."""

from pathlib import Path
from typing import NoReturn

import pytest

from megapipe.config import Config, load_config
from megapipe.conversion import exportable as module
from megapipe.conversion.exportable import check_exports
from megapipe.conversion.tokenizer import TokenizerDriftError
from megapipe.data.tokenizer import Tokenizer
from megapipe.errors import ConversionError
from megapipe.models.families import FAMILIES
from tests.checkpoint.samples import save_sample_weights


def make_config(corpus: Path, run: Path, *words: str) -> Config:
    given = [f"--train.run_dir={run}", "--checkpoint.export_every=2", *words]
    return load_config(corpus / "run.toml", given, FAMILIES)


def test_what_can_be_exported_passes(corpus: Path, tmp_path: Path) -> None:
    assert check_exports(make_config(corpus, tmp_path), FAMILIES) == []


def test_dropout_that_an_architecture_has_no_place_for_is_named(
    corpus: Path, tmp_path: Path
) -> None:
    both = ("--model.dropout=0.1", "--model.attention_dropout=0.2")
    (line,) = check_exports(make_config(corpus, tmp_path, *both), FAMILIES)
    assert line == (
        "LlamaForCausalLM has no place for model.dropout = 0.1, which the export leaves out: say "
        "it again where the model is trained on."
    )
    known = (*both, "--model.norm=layernorm", "--model.activation=gelu")
    assert check_exports(make_config(corpus, tmp_path, *known), FAMILIES) == [], "StarCoder 2"


def test_a_model_that_no_other_stack_has(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught:
        check_exports(make_config(corpus, tmp_path, "--model.norm=layernorm"), FAMILIES)
    assert "checkpoint.export_every = 2: Hugging Face has no such model" in str(caught.value)
    words = ("--model.norm=layernorm", "--checkpoint.export_every=0")
    assert check_exports(make_config(corpus, tmp_path, *words), FAMILIES) == []


def test_a_tokenizer_that_is_not_there_yet_ends_no_dry_run(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, f"--data.tokenizer={tmp_path}/none.model")
    (line,) = check_exports(config, FAMILIES, without_tokenizer=True)
    assert line.startswith("Whether the tokenizer can be exported is seen at the start: ")
    assert f"{tmp_path}/none.model does not exist" in line


@pytest.mark.parametrize("drift", [True, False])
def test_a_tokenizer_that_can_not_be_exported_is_refused_with_what_a_run_can_do(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drift: bool
) -> None:
    def refuse(tokenizer: Tokenizer, folder: Path, **options: object) -> NoReturn:
        if drift:
            raise TokenizerDriftError("it makes other ids.", "Say --so.", ["  'a': 1 here"])
        raise ConversionError("no such kind")

    monkeypatch.setattr(module, "export_tokenizer", refuse)
    with pytest.raises(ConversionError) as caught:
        check_exports(make_config(corpus, tmp_path), FAMILIES)
    first, *rest = str(caught.value).splitlines()
    if not drift:
        assert first == "checkpoint.export_every = 2: no such kind"
        assert rest == ["To train without exports: checkpoint.export_every = 0."]
        return
    assert first == (
        "checkpoint.export_every = 2: it makes other ids. Train without exports "
        "(checkpoint.export_every = 0), or with another data.tokenizer. Checkpoints can be "
        "exported later: `megapipe convert CHECKPOINT DST --allow-tokenizer-drift`."
    )
    assert rest == ["The first lines:", "  'a': 1 here"]


@pytest.mark.parametrize("key", ["load_from", "resume", "own"])
def test_the_architecture_that_a_run_came_from_is_tried_first(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """It decides on what transformers asks of a tokenizer."""
    seen: list[object] = []

    def note(tokenizer: Tokenizer, folder: Path, *, model_type: str, **options: object) -> None:
        seen.append(model_type)

    monkeypatch.setattr(module, "export_tokenizer", note)
    run = tmp_path / "run"
    check_exports(make_config(corpus, run), FAMILIES)
    origin = {"stack": "hugging_face", "architecture": "MistralForCausalLM", "name": "one"}
    there = tmp_path / "weights" if key != "own" else run / "checkpoints" / "step-00000002"
    save_sample_weights(there, {}, state={"origin": origin})
    words = () if key == "own" else (f"--checkpoint.{key}={there}",)
    check_exports(make_config(corpus, run, *words), FAMILIES)
    assert seen == ["llama", "mistral"]
