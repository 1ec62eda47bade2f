"""From a run's checkpoint, of whatever layout, to text on one process."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapipe.data.tokenizer import load_tokenizer
from megapipe.errors import CheckpointError, DataError, UsageError
from megapipe.models import load_pretrained
from megapipe.models.gpt.pretrained import load_kept_tokenizer
from megapipe.models.gpt.sampling import sample
from megapipe.tools.cli import main
from megapipe.tools.generate import run
from tests.conversion.models import save_model
from tests.corpus import VOCABULARY
from tests.data.tokenizer_samples import byte_level, save
from tests.data.tokenizer_samples import trained as trained_engine

PROMPT = "import json"
ALL_IDS = range(VOCABULARY)


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
    found = list(sample(model, tokens, ids=ALL_IDS, max_tokens=12, temperature=0))
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
    greedy = list(sample(model, [7], ids=ALL_IDS, max_tokens=8, temperature=0))
    assert list(sample(model, [7], ids=ALL_IDS, max_tokens=8, top_k=1, seed=3)) == greedy
    assert (
        list(sample(model, [7], ids=ALL_IDS, max_tokens=8, stop_token=greedy[0], temperature=0))
        == greedy[:1]
    )


def test_text_ends_where_the_model_does(trained: Path) -> None:
    model = load_pretrained(trained)
    length = model.config.max_sequence_length
    assert len(list(sample(model, [7] * (length - 3), ids=ALL_IDS, max_tokens=50))) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there_is_refused(trained: Path, device: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        run([str(trained), "--device", device])


def test_what_can_not_be_continued_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        run([str(tmp_path)])
    with pytest.raises(DataError, match="Give a shorter --prompt"):
        run([str(trained), "--prompt", "x " * 200])
    for words, said in (
        (["--temperature", "-1"], r"--temperature -1\.0 must be 0"),
        (["--temperature", "nan"], "--temperature nan must be 0"),
        (["--temperature", "inf"], "--temperature inf must be 0"),
        (["--seed", "-1"], "--seed -1 must be from 0"),
        (["--seed", "9" * 30], "must be from 0 to 9223372036854775807"),
        (["--prompt", "caf\udce9"], r"--prompt: not UTF-8 text: character 4 is byte 0xe9"),
    ):
        with pytest.raises(UsageError, match=said):
            run([str(trained), *words])
    broken = tmp_path / "run"
    shutil.copytree(trained, broken)
    for step in (broken / "checkpoints").iterdir():
        (step / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        run([str(broken)])


def test_only_tokens_of_the_tokenizer_are_sampled(trained: Path) -> None:
    """A model's vocabulary is larger than its tokenizer, or the ids have gaps."""
    model = load_pretrained(trained)
    few = [5, 17, 300]
    found = {
        token
        for seed in range(6)
        for token in sample(model, [7], ids=few, max_tokens=20, temperature=5.0, seed=seed)
    }
    assert found == set(few)
    for temperature in (0.0, 1e-30, 5e-324):
        greedy = list(sample(model, [7], ids=few, max_tokens=9, temperature=temperature))
        assert set(greedy) <= set(few)
        assert greedy == list(sample(model, [7], ids=few, max_tokens=9, top_k=1))
    assert len(list(sample(model, [7], ids=few, max_tokens=9, top_k=10**30))) == 9


def test_a_model_that_has_diverged_is_an_error(trained: Path) -> None:
    model = load_pretrained(trained)
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite numbers"):
        list(sample(model, [7], ids=ALL_IDS, max_tokens=1))


def test_a_named_json_tokenizer_is_found_again_in_checkpoints(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside another, and with a vocabulary smaller than the model's, with a gap in it."""
    save(tmp_path / "tok" / "tokenizer.json", byte_level(("<eos>",)))
    tree = json.loads(byte_level(("</s>",), text="import json and class").to_str())
    tree["model"]["vocab"]["import"] = 350
    named = tmp_path / "tok" / "code-32k.json"
    named.write_text(json.dumps(tree))
    run_dir = tmp_path / "run"
    words = [f"--train.run_dir={run_dir}", f"--data.tokenizer={named}", "--train.steps=2"]
    assert main(["train", str(corpus / "run.toml"), *words]) == 0
    said = capsys.readouterr().out
    assert f"Tokenizer: {named}" in said
    shutil.rmtree(tmp_path / "tok")
    text = generate(capsys, run_dir, "--temperature", "5", "--max-tokens", "60")
    assert text.startswith(PROMPT)
    kept = load_kept_tokenizer(run_dir)
    assert kept.ids[-1] == 350
    # The copy in the checkpoint is the same tokenizer to a run that goes on.
    again = [words[0], f"--data.tokenizer={kept.path}", "--train.steps=3"]
    assert main(["train", str(corpus / "run.toml"), *again]) == 0
    assert "at step 2" in capsys.readouterr().out


def test_a_prompt_that_the_tokenizer_does_not_know(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    named = save(tmp_path / "letters.json", trained_engine(engine, text="import json"))
    words = ["--data.max_unknown_share=1", f"--data.tokenizer={named}", "--train.steps=2"]
    run_dir = f"--train.run_dir={tmp_path / 'run'}"
    assert main(["train", str(corpus / "run.toml"), run_dir, *words]) == 0
    capsys.readouterr()
    with pytest.raises(DataError, match="no token for any of --prompt"):
        run([str(tmp_path / "run"), "--prompt", "\u041f\u0440"])
    assert run([str(tmp_path / "run"), "--prompt", "import \u041f", "--max-tokens", "2"]) == 0
    assert "does not know 1 of 8 characters of --prompt: '\u041f'" in capsys.readouterr().err


def test_a_character_that_is_not_whole_is_printed_at_the_end(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_kept_tokenizer(trained)
    half = tokenizer.encode("\U0001f642")[:-1]  # of the bytes that spell it
    assert tokenizer.decode(half).endswith("\ufffd")
    monkeypatch.setattr("megapipe.models.gpt.generation.sample", lambda *_, **__: iter(half))
    said = generate(capsys, trained)
    assert said.rstrip("\ufffd\n") == PROMPT
    assert said.endswith("\ufffd\n")


def test_a_tokenizer_too_large_for_the_model_is_found_before_weights_are_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = load_tokenizer(save(tmp_path / "large.json", byte_level(text="a b", size=VOCABULARY)))
    monkeypatch.setattr(large, "vocab_size", 5000)
    monkeypatch.setattr("megapipe.models.gpt.generation.load_kept_tokenizer", lambda _: large)
    monkeypatch.setattr("megapipe.models.gpt.generation.load_pretrained", None)  # is not reached
    newest = trained / "checkpoints" / "step-00000008"
    said = f"{newest}: its tokenizer large.json numbers tokens up to 4,999, and its model has only"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        run([str(trained)])


def test_a_hugging_face_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_model("llama", tmp_path / "llama")
    assert main(["generate", str(path)]) == 1
    assert "holds no tokenizer.json and no tokenizer.model: download it too.\n" in (
        capsys.readouterr().err
    )
    save(path / "tokenizer.json", byte_level(size=259))
    text = generate(capsys, path, "--temperature", "0")
    tokenizer, model = load_tokenizer(path), load_pretrained(path)
    tokens = tokenizer.encode(PROMPT)
    added = sample(
        model,
        tokens,
        ids=tokenizer.ids,
        max_tokens=20,
        temperature=0,
        stop_token=tokenizer.end_of_document,
    )
    assert text == tokenizer.decode(tokens + list(added)) + "\n"
    save(path / "tokenizer.json", byte_level(size=300))
    assert main(["generate", str(path)]) == 1
    assert f"{path}: its tokenizer tokenizer.json numbers tokens up to 298" in (
        capsys.readouterr().err
    )
