"""`megapipe tokenizer`: lossless, reproducible, same ids in Hugging Face form; clear refusals."""

import json
from pathlib import Path

import pytest

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


def test_inspect_says_what_it_is(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model), "--text", "x = 10"]) == 0
    out = capsys.readouterr().out
    assert f"{VOCABULARY} tokens" in out
    assert "sentencepiece bpe" in out
    assert "ids stay the same in Hugging Face form" in out
    assert "all of it comes back exactly" in out


def test_bad_rows_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        json.dumps({"text": f"some text of row {number} to learn from"}) for number in range(50)
    ]
    rows[3] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    out = tmp_path / "t.model"
    assert train(tmp_path / "a.jsonl", "--vocab-size", 290, "--out", out) == 0
    assert "a.jsonl, row 4: malformed JSON" in capsys.readouterr().out
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
    with pytest.raises(DataError, match="does not exist; train one with"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no tokenizer in it"):
        load_tokenizer(tmp_path / "empty")
