"""Tokenizers that are trained: lossless, reproducible, same ids in Hugging Face form; refusals."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megapipe.amounts import format_bytes
from megapipe.data import tokenizer_training
from megapipe.data.formats import DAMAGED, Raw, TextFile
from megapipe.data.tokenizer import load_tokenizer
from megapipe.errors import DataError, MegapipeError
from megapipe.tools.tokenizer import run
from tests.corpus import VOCABULARY, write_text, write_tokenizer

TRICKY = [
    "def f(x):\n\treturn  x  # two  spaces\n\n\n",
    "   leading and trailing   ",
    "naïve Ünïcode 漢字 🙂 \x00\x7f",
    "a literal <s> and </s> and <unk> stay text",
    "1234567890 3.14159",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_text(folder)
    return write_tokenizer(folder)


def train(*words: object) -> int:
    return run(["train", *map(str, words)])


def test_texts_come_back_exactly(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert tokenizer.vocab_size == VOCABULARY
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_document not in ids, "text is text"
        assert max(ids) < VOCABULARY


def test_the_same_files_give_the_same_model(model: Path, tmp_path: Path) -> None:
    write_text(tmp_path)
    again = write_tokenizer(tmp_path)
    assert load_tokenizer(again).sha256 == load_tokenizer(model).sha256


def test_ids_survive_in_hugging_face_form(model: Path) -> None:
    """transformers reads the model with the same ids for every line but literal special tokens."""
    from transformers import LlamaTokenizer

    ours, theirs = (
        load_tokenizer(model),
        LlamaTokenizer.from_pretrained(model.parent, add_prefix_space=False),
    )
    text = (model.parent / "text" / "json.txt").read_text()
    lines = [*text.splitlines()[:400], *(t for t in TRICKY if "<s>" not in t)]
    for line in lines:
        assert theirs.encode(line, add_special_tokens=False) == ours.encode(line), line


def test_a_hugging_face_directory_is_read_without_its_special_tokens(
    model: Path, tmp_path: Path
) -> None:
    from transformers import LlamaTokenizer

    LlamaTokenizer.from_pretrained(model.parent, add_prefix_space=False).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").is_file()
    ours, theirs = load_tokenizer(model), load_tokenizer(tmp_path)
    assert theirs.end_of_document == ours.end_of_document
    plain = [text for text in TRICKY if "<s>" not in text]
    assert theirs.encode_batch(plain) == ours.encode_batch(plain)
    assert theirs.end_of_document not in theirs.encode("a literal </s> is text")


def test_bad_rows_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        json.dumps({"text": f"some text of row {number} to learn from"}) for number in range(50)
    ]
    rows[3] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    out = tmp_path / "t.model"
    assert train(tmp_path / "a.jsonl", "--vocab-size", 290, "--out", out) == 0
    assert "a.jsonl, byte 135: skipped: malformed JSON" in capsys.readouterr().out
    assert out.is_file()


def test_what_can_not_be_trained_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 50)
    (tmp_path / "empty.txt").write_text("")
    cases = [
        (["a.txt", "--vocab-size", "5000", "--out", "t.model"], "--vocab-size 5000 is more than"),
        (["a.txt", "--vocab-size", "10", "--out", "t.model"], "--vocab-size 10 is too small"),
        (["a.txt", "--vocab-size", "300", "--out", "t.bin"], "has to end with .model"),
        (["none.txt", "--vocab-size", "300", "--out", "t.model"], "matches no file"),
        (["empty.txt", "--vocab-size", "300", "--out", "t.model"], "there is no text"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for words, message in cases:
            with pytest.raises(MegapipeError, match=message):
                train(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "empty.txt"]


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"t\.model.*is not a sentencepiece model"):
        load_tokenizer(tmp_path / "t.model")
    with pytest.raises(DataError, match=r"does not exist; train a tokenizer with .*, or name a ch"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no tokenizer in it"):
        load_tokenizer(tmp_path / "empty")


def test_the_one_character_that_does_not_come_back_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("progress \u2581\u2582\u2583 of a run\n" * 40)
    assert train(tmp_path / "a.txt", "--vocab-size", 290, "--out", tmp_path / "t.model") == 0
    assert '"\u2581" U+2581 40 times in the text' in capsys.readouterr().out


def test_all_other_characters_come_back(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    surrogates = range(0xD800, 0xE000)
    step = 7  # every code point takes 15 s; steps of 7 meet each block
    for start in range(step):
        wanted = [
            chr(code)
            for code in range(start, 0x3000 if start else 0x110000, step)
            if code not in surrogates and code != 0x2581
        ]
        assert tokenizer.decode(tokenizer.encode("a".join(wanted))) == "a".join(wanted)


def test_a_tokenizer_that_is_replaced_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some text to learn from\n" * 40)
    words = (tmp_path / "a.txt", "--vocab-size", 280, "--out", tmp_path / "new" / "t.model")
    assert train(*words) == 0
    assert "replaced" not in capsys.readouterr().out
    assert train(*words) == 0
    assert "replaced    the tokenizer that had this name" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.model"]


def test_an_interrupted_training_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("some text to learn from\n" * 40)
    monkeypatch.setattr(tokenizer_training, "train_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a.txt", "--vocab-size", 280, "--out", tmp_path / "new" / "t.model")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_files_without_usable_text_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n' * 8)
    with pytest.raises(DataError, match="there is no usable text in any of the files"):
        train(tmp_path / "a.jsonl", "--vocab-size", 280, "--out", tmp_path / "t.model")
    assert "a.jsonl, byte 0: skipped: missing field 'text'" in capsys.readouterr().out


def test_damage_is_reported_with_its_bytes_behind_many_bad_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"text": f"text of row {number}"}) for number in range(4000)]
    (tmp_path / "a.jsonl").write_text("{\n" * 90 + "\n".join(rows))
    whole = gzip.compress("\n".join(rows).encode(), mtime=0)
    half = len(whole) // 2
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:half] + b"\xff" * 500 + whole[half + 500 :])
    assert train(tmp_path, "--vocab-size", 280, "--out", tmp_path / "t.model") == 0
    out = capsys.readouterr().out
    assert "b.jsonl.gz, byte " in out
    assert f": skipped: {DAMAGED}" in out
    assert out.count(": skipped: malformed JSON") == 5, "the others are counted"
    (line,) = (line for line in out.splitlines() if line.startswith("  left out    9"))
    assert f"1 {DAMAGED})" in line
    assert re.search(r"; [\d,]+ bytes of files can't be read$", line)


def test_files_that_are_named_twice_are_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some text to learn from\n" * 40)
    (tmp_path / "b.txt").symlink_to("a.txt")
    words = (tmp_path / "a.txt", tmp_path / "*.txt", "--vocab-size", 280)
    assert train(*words, "--out", tmp_path / "t.model") == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/*.txt: passed over 1 further name" in out
    assert f"read already, such as {tmp_path}/b.txt." in out
    assert f"shares 1 file with {tmp_path}/a.txt, such as {tmp_path}/a.txt. What both" in out


def test_the_size_of_files_is_measured_and_that_of_text_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(f"line {number} to learn from\n" for number in range(400)).encode()
    (tmp_path / "a.txt.gz").write_bytes(packed := gzip.compress(text, mtime=0))
    assert train(tmp_path / "*.gz", "--vocab-size", 280, "--out", tmp_path / "t.model") == 0
    size, guess = format_bytes(len(packed)), format_bytes(4 * len(packed))
    line = f"  text        1 file, {size}; about {guess} if files unfold to 4 times their size\n"
    assert line in capsys.readouterr().out
    (tmp_path / "a.txt").write_bytes(text)
    assert train(tmp_path / "*.txt", "--vocab-size", 280, "--out", tmp_path / "t.model") == 0
    assert f"  text        1 file, {format_bytes(len(text))}\n" in capsys.readouterr().out


@pytest.mark.parametrize("failure", [DataError("a.txt: has changed."), KeyboardInterrupt()])
def test_what_ends_the_reading_is_raised_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def rows(*_: object) -> Iterator[Raw]:
        yield Raw(b"some text to learn from\n" * 40, 0)
        raise failure

    (tmp_path / "a.txt").write_text("some text to learn from\n" * 40)
    monkeypatch.setattr(TextFile, "rows", rows)
    with pytest.raises(type(failure)) as caught:
        train(tmp_path / "a.txt", "--vocab-size", 280, "--out", tmp_path / "t.model")
    assert caught.value is failure
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
