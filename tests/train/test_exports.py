"""Exports while training: what others load is what the checkpoint of the step holds."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import transformers

from megapipe.checkpoint.attempt import Attempt
from megapipe.checkpoint.load import open_checkpoint
from megapipe.config import load_config
from megapipe.distributed.rank_group import ALONE
from megapipe.models import load_pretrained
from megapipe.models.families import FAMILIES
from megapipe.tools.cli import main
from megapipe.train import exports as module
from megapipe.train.exports import Exports
from tests.corpus import VOCABULARY


def test_a_run_in_parts_exports_what_others_load(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [
        f"--train.run_dir={run}",
        "--train.steps=3",
        "--checkpoint.every=0",
        "--checkpoint.export_every=2",
        "--parallel.tensor=2",
        "--model.dropout=0.1",
    ]
    assert main(["train", str(corpus / "run.toml"), *words]) == 0
    left_out = "LlamaForCausalLM has no place for model.dropout = 0.1, which the export leaves out"
    assert capfd.readouterr().out.count(left_out) == 1
    exported = run / "exports" / "step-00000002"
    assert [path.name for path in exported.parent.iterdir()] == ["step-00000002"]
    ours = load_pretrained(run / "checkpoints" / "step-00000002")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokens = torch.randint(0, 400, (1, 30))
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer("import json")["input_ids"]) == "import json"
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "Trained for 2 steps" in card
    assert str(corpus / "text/*.txt") in card

    assert main(["export", str(run)]) == 0  # of the newest, proven
    assert capfd.readouterr().out.count(left_out) == 1
    assert (run / "exports" / "step-00000003" / "model.safetensors").is_file()
    with_names = [path.name for path in sorted(exported.iterdir())]
    assert with_names == [path.name for path in sorted((run / "exports/step-00000003").iterdir())]


def test_what_no_other_stack_has_is_refused_at_the_start(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [f"--train.run_dir={run}", "--checkpoint.export_every=2", "--model.norm=layernorm"]
    assert main(["train", str(corpus / "run.toml"), *words]) == 1
    said = capfd.readouterr().err
    assert "checkpoint.export_every = 2: Hugging Face has no such model" in said
    assert 'model.norm = "layernorm": LlamaForCausalLM has no setting for that' in said
    assert not (run / "checkpoints").exists()


def make_exports(
    corpus: Path, run: Path, *words: str, say: Callable[[str], None] = print
) -> Exports:
    given = [f"--train.run_dir={run}", "--checkpoint.export_every=2", *words]
    config = load_config(corpus / "run.toml", given, FAMILIES)
    return Exports(config, FAMILIES[config.model.family], ALONE, say)


def test_an_export_is_missed_where_its_checkpoint_lies_alone(corpus: Path, tmp_path: Path) -> None:
    found = make_exports(corpus, tmp_path)
    assert found.missed(0) is None
    assert found.missed(2) is None, "it goes on from a checkpoint elsewhere"
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    assert found.missed(2) == checkpoint
    assert found.missed(3) is None, "it is not due"
    assert make_exports(corpus, tmp_path, "--checkpoint.export_every=0").missed(2) is None
    (tmp_path / "exports" / "step-00000002").mkdir(parents=True)
    assert found.missed(2) is None


def test_what_killed_starts_left_goes_and_what_is_being_written_stays(
    corpus: Path, tmp_path: Path
) -> None:
    root = tmp_path / "exports"
    make_exports(corpus, tmp_path).clear()  # there is none yet
    (root / ".tmp-step-00000002-0123abcd").mkdir(parents=True)
    (root / "step-00000001").mkdir()
    attempt = Attempt()
    folder = attempt.make(root / "step-00000003")
    make_exports(corpus, tmp_path).clear()
    attempt.release()
    assert {*root.iterdir()} == {folder, root / "step-00000001"}


def test_what_can_not_be_cleared_up_does_not_end_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(root: Path) -> NoReturn:
        raise OSError(errno.EBUSY, "Device or resource busy", f"{root}/.tmp-step-00000002-01234567")

    monkeypatch.setattr(module, "clear_leftovers", refuse)
    said: list[str] = []
    make_exports(corpus, tmp_path, say=said.append).clear()
    (line,) = said
    assert line.startswith(f"Warning: cannot clear up {tmp_path}/exports: ")
    assert "Device or resource busy" in line


def test_an_export_that_fails_says_how_to_make_up_for_it(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    said = make_exports(corpus, run).write(run / "checkpoints" / "step-00000002", 2)
    assert said.startswith("NOT EXPORTED at step 2: cannot export ")
    assert said.endswith(
        f"To make up for it: `megapipe convert '{run}/checkpoints/step-00000002' "
        f"'{run}/exports/step-00000002'`"
    )


def test_what_was_missed_is_made_up_for(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever start comes next, with what is left half-written cleared away before."""
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    left = tmp_path / "exports" / ".tmp-step-00000002-0123abcd"
    left.mkdir(parents=True)
    said: list[str] = []

    def note(self: Exports, checkpoint: Path, step: int) -> str:
        assert not left.exists()
        return f"Exported {checkpoint.name} at {step}"

    monkeypatch.setattr(Exports, "write", note)
    make_exports(corpus, tmp_path, "--checkpoint.export_every=0", say=said.append).catch_up(2)
    assert left.exists()
    found = make_exports(corpus, tmp_path, say=said.append)
    found.catch_up(3)
    found.catch_up(2)
    assert said == ["Exported step-00000002 at 2"]


def test_a_run_from_another_stacks_model_exports_one_of_that_kind(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when it is resumed."""
    phi, run = tmp_path / "phi-small", tmp_path / "run"
    shape = transformers.Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        sliding_window=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    transformers.Phi3ForCausalLM(shape).save_pretrained(phi)
    text = (corpus / "run.toml").read_text(encoding="utf-8")
    model, rest = text.index("[model]"), text.index("[train]")
    toml = tmp_path / "run.toml"
    toml.write_text(text[:model] + text[rest:], encoding="utf-8")

    def train(steps: int) -> None:
        words = [f"--train.run_dir={run}", f"--checkpoint.load_from={phi}"]
        words += ["--checkpoint.every=0", "--checkpoint.export_every=1"]
        words += ["--optimizer.warmup_steps=0", f"--train.steps={steps}"]
        assert main(["train", str(toml), "--parallel.data=1", *words]) == 0

    def exported(step: int) -> str:
        folder = run / "exports" / f"step-{step:08d}"
        assert "Trained from phi-small." in (folder / "README.md").read_text(encoding="utf-8")
        (name,) = json.loads((folder / "config.json").read_bytes())["architectures"]
        return str(name)

    train(1)
    origin = {"stack": "hugging_face", "architecture": "Phi3ForCausalLM", "name": "phi-small"}
    checkpoint = run / "checkpoints" / "step-00000001"
    assert open_checkpoint(checkpoint).state["origin"] == origin
    assert exported(1) == "Phi3ForCausalLM"

    shutil.rmtree(run / "exports")  # as if killed before it
    train(1)
    assert f"Exported {run}/exports/step-00000001" in capfd.readouterr().out
    assert exported(1) == "Phi3ForCausalLM"
    train(2)
    assert exported(2) == "Phi3ForCausalLM"
