"""`megapipe train CONFIG --dry-run` of the configs that ship, and without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megapipe.config import load_config
from megapipe.layout.estimates import parameter_count, rank_states
from megapipe.models.families import FAMILIES
from megapipe.tools.cli import main
from tests.layouts import layout_of

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
# Processes that the comments in each file speak of.
WORLD_SIZES = {
    "quickstart": 4,
    "gpt2-124m": 1,
    "llama3-8b-2nodes": 16,
    "llama3-70b": 512,
    "gpt3-175b": 1536,
    "megatron-1t": 3072,
}


def test_every_config_that_ships_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(WORLD_SIZES)


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_configs_that_ship(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / f"{name}.toml")
    world_size = WORLD_SIZES[name]
    assert main(["train", path, "--dry-run", "--world-size", str(world_size)]) == 0
    shown = capsys.readouterr().out
    assert f"Layout: {world_size:,} rank" in shown
    layout = layout_of(load_config(path, [], FAMILIES), world_size)
    assert f"Parameters: {parameter_count(layout):,} (" in shown
    assert len(shown.splitlines()) < 160
    assert max(len(line) for line in shown.splitlines()) <= 110
    # Every rank of the run fits into a GPU of 80 GB with room for activations.
    assert max(states.total for states in rank_states(layout)) < 40 * 2**30


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}


def test_imports_no_torch(tmp_path: Path) -> None:
    """Nor does it to read which model is loaded."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    words = ["train", str(CONFIGS / "llama3-70b.toml"), "--dry-run"]
    words += ["--checkpoint.load_from", str(tmp_path), "--train.run_dir", f"{tmp_path}/run"]
    program = (
        "import sys; from megapipe.tools.cli import main; "
        f"status = main({words!r}); "
        "sys.exit(status or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--checkpoint.export_every=2", "--model.norm=layernorm"],
            "checkpoint.export_every = 2: Hugging Face has no such model",
        ),
        (
            ["--checkpoint.load_from=MODEL", '--checkpoint.load_state=["weights", "step"]'],
            'asks for "step", and checkpoint.load_from = "MODEL" is a Hugging Face model, which '
            'gives a run weights. Set checkpoint.load_state = ["weights"].',
        ),
    ],
)
def test_what_a_start_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    model = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    words = [f"--train.run_dir={tmp_path}/run", *(word.replace("MODEL", model) for word in words)]
    assert main(["train", str(CONFIGS / "llama3-70b.toml"), "--dry-run", *words]) == 1
    assert said.replace("MODEL", model) in capsys.readouterr().err


def test_a_tokenizer_need_not_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "--checkpoint.export_every=2"]
    assert main(["train", str(CONFIGS / "llama3-70b.toml"), *words]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Whether the tokenizer can be exported is seen at the start: ")
