"""Tiny trainings whose results are kept, and what trains them.

    python -m tests.golden.runs FOLDER [CASE ...]       trains every case, or those named, in FOLDER

A case is a setting (the model and whatever else changes the loss) in a layout (which changes
nothing). Text, tokenizer and config are written here from fixed rules and named by relative paths,
so that the runs are the same on every machine; what remains are roundings, in float64.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import json
import shutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapipe.tools.cli import main as megapipe

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
CHECKPOINT = HERE / "checkpoint"
"""Written by RESUMED after step SAVED_STEP."""

STEPS, SAVED_STEP = 4, 2
EXACT = ("step", "tokens", "epoch", "skipped_rows", "batch_hash")
ROUNDED = ("loss", "grad_norm", "validation_loss", "learning_rate")


# --- Settings ------------------------------------------------------------------------------------

CONFIG = """\
[model]
num_layers = {layers}
hidden_size = 8
num_heads = 4
vocab_size = 31
max_sequence_length = 16
init_std = 0.2
{model}
[train]
run_dir = "run"
steps = {steps}
global_batch_size = 8
micro_batch_size = 2
sequence_length = 12
precision = "fp64"
device = "cpu"
{train}
[optimizer]
learning_rate = 1e-2
warmup_steps = 1

[data]
tokenizer = "tokenizer.json"
streams = 4
{data}
[[data.sources]]
name = "text"
path = "text/*.txt"
documents = "line"
weight = 2.0

[[data.sources]]
name = "rows"
path = "text/rows.jsonl"

[checkpoint]
every = {saved}

[logging]
wandb = "off"
"""
GPT2 = """\
norm = "layernorm"
activation = "gelu_tanh"
position = "learned"
tie_embeddings = true
bias = true
qkv_bias = true
dropout = 0.1
attention_dropout = 0.1
"""
LLAMA = """\
num_kv_heads = 2
ffn_hidden_size = 12
"""
QWEN = """\
num_kv_heads = 1
ffn_hidden_size = 12
qk_norm = true
qkv_bias = true
sliding_window = 5
tie_embeddings = true
"""
SMALL = """\
num_kv_heads = 1
head_dim = 2
ffn_hidden_size = 4
dropout = 0.1
"""
VALIDATION = "validation_every = 2\nvalidation_batches = 2\n"
LINEAR_LOSS = "linear_cross_entropy = true\nz_loss = 1e-3\n"
DOCUMENTS = "mask_documents = true\n"


@dataclass(frozen=True)
class Setting:
    """The lines of the sections [model], [train] and [data] by which settings differ."""

    model: str
    train: str = ""
    data: str = ""
    layers: int = 4

    @property
    def config(self) -> str:
        """The TOML file of a run."""
        return CONFIG.format(steps=STEPS, saved=SAVED_STEP, **vars(self))


SETTINGS = {
    "gpt2": Setting(GPT2, layers=5),
    "llama": Setting(LLAMA, train=VALIDATION, data="validation_fraction = 0.2\n"),
    "documents": Setting(LLAMA, data=DOCUMENTS),
    "qwen": Setting(QWEN, train=LINEAR_LOSS),
    "resumed": Setting(SMALL, data=DOCUMENTS),
}

# --- Layouts -------------------------------------------------------------------------------------

LAYOUTS = {
    "one": "",
    "tp2-sp": "tensor=2 sequence_parallel=true",
    "pp2-zb-v": "pipeline=2 virtual=2 schedule=zb-v",
    "dp2-tp2": "data=2 tensor=2",
    "dp2-pp2": "data=2 pipeline=2",
    "tp2-pp2-v2": "tensor=2 pipeline=2 virtual=2 schedule=interleaved-1f1b",
    "tp2-pp2-zb-h1": "tensor=2 pipeline=2 schedule=zb-h1 sequence_parallel=true",
}
RECOMPUTE = "--train.recompute=full"


@dataclass(frozen=True)
class Case:
    """A setting in a layout; `more` are options that must change nothing either."""

    setting: str
    layout: str
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self.setting, self.layout, *(word.split("=")[-1] for word in self.more)]
        return "-".join(parts)

    @property
    def options(self) -> list[str]:
        """The layout as a user would type it."""
        return [*(f"--parallel.{word}" for word in LAYOUTS[self.layout].split()), *self.more]


RESUMED = Case("resumed", "tp2-pp2-v2")
"""The run that wrote CHECKPOINT; all cases of its setting go on from there."""
CASES = [
    Case("gpt2", "one"),
    Case("gpt2", "dp2-pp2"),
    Case("gpt2", "tp2-pp2-v2"),
    Case("llama", "dp2-tp2"),
    Case("documents", "tp2-sp", (RECOMPUTE,)),
    Case("documents", "pp2-zb-v"),
    Case("qwen", "tp2-pp2-zb-h1"),
    Case("resumed", "one"),
    RESUMED,
]

# --- Inputs --------------------------------------------------------------------------------------

END = "<|endoftext|>"
WORDS = [f"w{number}" for number in range(30)]


def write_inputs(folder: Path) -> None:
    """A tokenizer with a token for each word, and text of those words in two formats."""
    vocabulary = {word: number for number, word in enumerate([END, *WORDS])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": END,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": END},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    text = folder / "text"
    text.mkdir()
    sentences = list(_sentences(100))
    for number in range(2):
        lines = "".join(f"{line}\n" for line in sentences[30 * number : 30 * (number + 1)])
        (text / f"{number}.txt").write_text(lines, encoding="utf-8")
    rows = "".join(f"{json.dumps({'text': line})}\n" for line in sentences[60:])
    (text / "rows.jsonl").write_text(rows, encoding="utf-8")


def _sentences(count: int) -> Iterator[str]:
    """Words from a generator written out here: Python's own may change with its version."""
    state = 1
    for _ in range(count):
        words = []
        for _ in range(4 + state % 9):
            state = (1103515245 * state + 12345) % 2**31
            words.append(WORDS[(state >> 16) % len(WORDS)])
        yield " ".join(words)


# --- Running -------------------------------------------------------------------------------------


def train(case: Case, folder: Path, *options: str) -> None:
    """Train in `folder`, which is made, in a process of its own; what it prints is `output.txt`."""
    folder.mkdir(parents=True)
    write_inputs(folder)
    (folder / "run.toml").write_text(SETTINGS[case.setting].config, encoding="utf-8")
    sys.stdout.flush()
    pid = os.fork()  # with torch imported already
    if pid == 0:
        _become_command(folder, ["train", "run.toml", *case.options, *options])
    os.waitpid(pid, 0)


def _become_command(folder: Path, words: list[str]) -> None:
    status = 1
    try:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = megapipe(words)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def resume(case: Case, folder: Path) -> None:
    """Go on from a copy of the golden checkpoint."""
    saved = next(CHECKPOINT.iterdir())
    copy = folder.with_name(f"{folder.name}-from") / saved.name
    shutil.copytree(saved, copy)
    train(case, folder, f"--checkpoint.resume=../{copy.parent.name}/{copy.name}")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged of each step, as far as it does not depend on the machine."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    logged = [json.loads(line) for line in lines]
    return [{name: row[name] for name in (*EXACT, *ROUNDED)} for row in logged]


def main(folder: Path, *names: str) -> None:
    for case in CASES:
        if names and str(case) not in names:
            continue
        (resume if case.setting == RESUMED.setting else train)(case, folder / str(case))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
