"""A small corpus of real text, a tokenizer trained on it, and a config that trains on both."""

import sysconfig
from pathlib import Path

VOCABULARY = 400
MODULES = ("json", "email", "http", "logging", "unittest", "asyncio", "importlib", "collections")
CONFIG = """\
[model]
preset = "llama-micro"
vocab_size = {vocabulary}

[train]
run_dir = "{folder}/run"
steps = {steps}
global_batch_size = 8
micro_batch_size = 2
sequence_length = 32
precision = "fp32"
device = "cpu"

[optimizer]
learning_rate = 3e-3
warmup_steps = 2

[data]
tokenizer = "{folder}/tokenizer.model"
streams = 8

[[data.sources]]
name = "text"
path = "{folder}/text/*.txt"

[checkpoint]
every = 5

[logging]
wandb = "off"
"""


def write_text(folder: Path) -> Path:
    """Standard library sources, one .txt per package."""
    library = Path(sysconfig.get_path("stdlib"))
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for module in MODULES:
        parts = [
            path.read_text(encoding="utf-8") for path in sorted((library / module).glob("*.py"))
        ]
        (text / f"{module}.txt").write_text("".join(parts), encoding="utf-8")
    return text


def write_tokenizer(folder: Path) -> Path:
    """A sentencepiece model of VOCABULARY tokens, trained on `folder`'s text; takes a second."""
    from megapipe.tools.cli import main

    out = folder / "tokenizer.model"
    words = ["tokenizer", "train", str(folder / "text" / "*.txt"), "--vocab-size", str(VOCABULARY)]
    assert main([*words, "--sample-bytes", "300000", "--out", str(out)]) == 0
    return out


def write_config(folder: Path, *, steps: int) -> Path:
    """A micro Llama on `folder`'s text and tokenizer."""
    path = folder / "run.toml"
    path.write_text(
        CONFIG.format(folder=folder, steps=steps, vocabulary=VOCABULARY), encoding="utf-8"
    )
    return path
