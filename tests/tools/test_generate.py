"""From a run's checkpoint, of whatever layout, to text on one process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapipe.errors import CheckpointError, MegapipeError
from megapipe.models import load_pretrained
from megapipe.models.sampling import sample
from megapipe.tools.arguments import UsageError
from megapipe.tools.generate import run

PROMPT = "import json"


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, left by tensor 2 x pipeline 2."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    layout = ["--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.sequence_parallel=true"]
    words = ["train", str(corpus / "run.toml"), f"--train.run_dir={run_dir}", *layout]
    subprocess.run([sys.executable, "-m", "megapipe", *words], check=True, capture_output=True)
    return run_dir


def generate(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> str:
    capsys.readouterr()
    assert run([str(path), "--prompt", PROMPT, "--max-tokens", "20", *words]) == 0
    return capsys.readouterr().out


def test_the_same_seed_gives_the_same_text(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generate(capsys, trained, "--seed", "1")
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT) + 1
    assert generate(capsys, trained, "--seed", "1") == text
    assert generate(capsys, trained, "--seed", "2") != text
    newest = trained / "checkpoints" / "step-00000008"
    assert generate(capsys, newest, "--seed", "1") == text


def test_greedy_text_is_what_whole_sequences_give(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache and the sampler against the plain model, token by token."""
    model = load_pretrained(trained)
    tokens = [5, 9, 300, 17]
    found = list(sample(model, tokens, max_tokens=12, temperature=0))
    for token in found:
        logits = model(torch.tensor([tokens]))
        assert logits.shape == (1, len(tokens), model.config.vocab_size)
        assert token == int(logits[0, -1].argmax())
        tokens.append(token)
    assert generate(capsys, trained, "--temperature", "0") == generate(
        capsys, trained, "--temperature", "0", "--seed", "9"
    )


def test_top_k_takes_the_likeliest(trained: Path) -> None:
    model = load_pretrained(trained)
    greedy = list(sample(model, [7], max_tokens=8, temperature=0))
    assert list(sample(model, [7], max_tokens=8, top_k=1, seed=3)) == greedy
    assert list(sample(model, [7], max_tokens=8, stop_token=greedy[0], temperature=0)) == greedy[:1]


def test_text_ends_where_the_model_does(trained: Path) -> None:
    model = load_pretrained(trained)
    length = model.config.max_sequence_length
    assert len(list(sample(model, [7] * (length - 3), max_tokens=50))) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there_is_refused(trained: Path, device: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        run([str(trained), "--device", device])


def test_what_can_not_be_continued_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        run([str(tmp_path)])
    with pytest.raises(MegapipeError, match="Give a shorter --prompt"):
        run([str(trained), "--prompt", "x " * 200])
    with pytest.raises(MegapipeError, match=r"--temperature -1\.0 must be a number, 0"):
        run([str(trained), "--temperature", "-1"])
    broken = tmp_path / "run"
    shutil.copytree(trained, broken)
    for step in (broken / "checkpoints").iterdir():
        (step / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        run([str(broken)])
