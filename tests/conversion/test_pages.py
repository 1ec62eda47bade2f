"""The commands of the pages on conversion, run with a small model in place of the named one."""

import contextlib
import io
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megapipe.conversion.tokenizer import export_tokenizer
from megapipe.data.tokenizer import load_tokenizer
from megapipe.tools.cli import main
from tests.conversion.models import SHAPE
from tests.corpus import VOCABULARY

DOCS = Path(__file__).parents[2] / "docs"
SMALLER = """
    --train.steps=2 --checkpoint.export_every=1 --train.global_batch_size=4 --data.streams=4
    --train.device=cpu --train.precision=fp32 --logging.wandb=off --optimizer.warmup_steps=1
    --checkpoint.every=0 --train.sequence_length=64
"""


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_commands(page: str, *more: str) -> None:
    """Every command of the page's blocks, in order; `more` is for conversions."""
    for line in "".join(blocks(page, "sh")).splitlines():
        program, *words = shlex.split(line)
        assert program == "megapipe"
        words += {"train": shlex.split(SMALLER), "convert": [*more]}.get(words[0], [])
        assert main(words) == 0, line


@pytest.fixture(scope="module")
def place(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model and the text that the pages name."""
    place = tmp_path_factory.mktemp("pages")
    model = place / "models" / "SmolLM2-135M"
    config = transformers.LlamaConfig(
        **{**SHAPE, "vocab_size": VOCABULARY, "num_hidden_layers": 2}, tie_word_embeddings=True
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    export_tokenizer(tokenizer, model, allow_drift=False, max_length=128)
    shutil.copytree(corpus / "text", place / "text")
    (place / "megatron").mkdir()
    shutil.copy(corpus / "tokenizer.model", place / "megatron")
    return place


def test_bring_train_and_take_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (config,) = blocks("conversion.md", "toml")
    Path("mine.toml").write_text(config, encoding="utf-8")
    run_commands("conversion.md")
    assert [path.name for path in sorted(Path("runs/mine/exports").iterdir())] == [
        "step-00000001",
        "step-00000002",
    ]
    printed, names = io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(printed):
        for code in blocks("conversion.md", "python"):
            exec(code, names)
    assert printed.getvalue().startswith("The quick brown")
    text, logits = names["text"], names["logits"]
    with torch.no_grad():
        theirs = names["model"](text["input_ids"]).logits
    assert torch.allclose(logits, theirs, atol=1e-4)


def test_leaving_megatron_and_going_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    unproven = () if find_spec("megatron") else ("--no-proof",)
    assert main(["convert", "models/SmolLM2-135M", "base", "--no-proof"]) == 0
    assert main(["convert", "base", "megatron/run", "--to=GPTModel", *unproven]) == 0
    run_commands("leaving-megatron.md", *unproven)
