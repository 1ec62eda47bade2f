"""`megapipe tokenizer`: what it prints, and what it refuses before any work."""

import os
from pathlib import Path

import pytest

from megapipe.data import tokenizer_training
from megapipe.errors import MegapipeError, UsageError
from megapipe.tools.tokenizer import run
from tests.corpus import VOCABULARY, write_text, write_tokenizer
from tests.data.tokenizer_samples import byte_level, save, sentencepiece_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_text(folder)
    return write_tokenizer(folder)


def train(*words: object) -> int:
    return run(["train", *map(str, words)])


def test_inspect_says_what_it_is(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model), "--text", "x = 10"]) == 0
    out = capsys.readouterr().out
    assert f"{VOCABULARY} tokens" in out
    assert "sentencepiece bpe" in out
    assert "ids stay the same in Hugging Face form" in out
    assert "all of it decodes to the same text" in out


def test_a_place_that_can_not_be_written_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer_training, "train_tokenizer", None)  # is not reached
    (tmp_path / "a.txt").write_text("abc " * 50)
    (tmp_path / "there.model").mkdir()
    (tmp_path / "leads.nowhere").symlink_to("gone")
    cases = {
        "a.txt/t.model": "a.txt is not a directory",
        "a.txt/b/t.model": "a.txt is not a directory",
        "there.model": "is a directory: name a file in it",
        "leads.nowhere/t.model": "leads.nowhere is not a directory",
        f"{'x' * 300}.model": "a name of 306 bytes is too long",
        f"new/{'x' * 300}/t.model": "a name of 300 bytes is too long",
        "/proc/t.model": "no permission to write to /proc",
    }
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path("/proc"))  # root may
    for out, said in cases.items():
        with pytest.raises(UsageError, match=f"--out {out} .*{said}"):
            train("a.txt", "--vocab-size", 290, "--out", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "leads.nowhere", "there.model"]


def test_numbers_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 50)
    for words, said in (
        (["--vocab-size", "0"], "--vocab-size 0 must be from 1"),
        (["--vocab-size", "-5"], "--vocab-size -5 must be from 1"),
        (["--vocab-size", "9" * 30], "must be from 1 to 10,000,000"),
        (["--vocab-size", "290", "--sample-bytes", "0"], "--sample-bytes 0 must be 1 or more"),
    ):
        with pytest.raises(UsageError, match=said):
            train(tmp_path / "a.txt", *words, "--out", tmp_path / "t.model")


def test_inspect_names_the_file_and_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = byte_level(("<|endoftext|>",))
    save(tmp_path / "tokenizer.json", engine, tokenizer_config={"eos_token": "<|endoftext|>"})
    sentencepiece_model(tmp_path / "tokenizer.model", byte_fallback=False, size=40)
    assert run(["inspect", str(tmp_path), "--text", "the fox"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/tokenizer.json\n")
    assert f"0 ('<|endoftext|>', eos_token of {tmp_path}/tokenizer_config.json)" in out
    assert "not used    tokenizer.model" in out
    assert (
        run(["inspect", str(tmp_path / "tokenizer.model"), "--text", "the fox \u0416\u0416"]) == 0
    )
    out = capsys.readouterr().out
    assert '25.0% of its characters are unknown to the tokenizer and lost ("\u0416" U+0416' in out
    with pytest.raises(MegapipeError, match=r"--text: not UTF-8 text: character 4 is byte 0xe9"):
        run(["inspect", str(tmp_path), "--text", "caf\udce9"])
