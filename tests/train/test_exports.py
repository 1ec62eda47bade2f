"""Exports while training: what others load is what the checkpoint of the step holds."""

from pathlib import Path

import pytest
import torch
import transformers

from megapipe.models import load_pretrained
from megapipe.tools.cli import main


def test_a_run_in_parts_exports_what_others_load(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        f"--train.run_dir={run}",
        "--train.steps=3",
        "--checkpoint.every=0",
        "--checkpoint.export_every=2",
        "--parallel.tensor=2",
    ]
    assert main(["train", str(corpus / "run.toml"), *words]) == 0
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
