"""The sample of each source before a run: its estimate of tokens, and what it finds lost."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megapipe.config import SourceConfig
from megapipe.data.sample import SourceSample, evenly, sample_sources
from megapipe.data.sources import open_source
from megapipe.data.text_check import check_texts, name_characters
from megapipe.data.tokenizer import load_tokenizer
from tests.data.samples import ByteTokenizer, jsonl, write
from tests.data.test_text_ends import ENGINES
from tests.data.tokenizer_samples import TEXT, byte_level, save, sentencepiece_model, trained

TEXTS = [f"{number}: " + "words and more " * (1 + number % 7) for number in range(600)]
TOKENS = sum(len(text.encode()) + 1 for text in TEXTS)


def sample(path: Path, **fields: str) -> SourceSample:
    config = SourceConfig(name="a", path=str(path), **fields)  # type: ignore[arg-type]
    (found,) = sample_sources([open_source(config, "data.sources[0]", 4)], ByteTokenizer())
    return found


def test_tokens_are_estimated_from_a_part(tmp_path: Path) -> None:
    for part in range(6):
        write(tmp_path / f"{part}.jsonl", jsonl(TEXTS * 8))
    found = sample(tmp_path / "*.jsonl")
    assert found.check.size < 300 << 10, "a part"
    assert found.tokens == pytest.approx(48 * TOKENS, rel=0.02)
    assert (found.assumption, found.check.exact) == ("", found.check.texts)
    assert found.stored == 48 * len(jsonl(TEXTS))

    long = "\n".join(TEXTS) * 40  # one document of which a part is looked at
    write(tmp_path / "a.txt", long.encode())
    found = sample(tmp_path / "a.txt")
    assert found.check.size < 300 << 10
    assert found.tokens == pytest.approx(len(long), rel=0.01)


def test_tables_are_counted_by_rows_and_compressed_text_by_a_guess(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": TEXTS * 4, "other": list(range(2400))})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert sample(tmp_path / "a.parquet").tokens == pytest.approx(4 * TOKENS, rel=0.02)
    write(tmp_path / "a.jsonl.gz", jsonl(TEXTS))
    found = sample(tmp_path / "a.jsonl.gz")
    assert found.assumption == "if files unfold to 4 times their size"
    assert found.tokens is not None


@pytest.mark.parametrize(
    "blank", [b"\n" * 5000, (b" " * 100_000 + b"\n") * 200], ids=["rows", "bytes"]
)
def test_rows_without_text_are_read_to_a_limit(tmp_path: Path, blank: bytes) -> None:
    write(tmp_path / "a.jsonl", blank[: len(blank) // 50] + jsonl(TEXTS))
    assert sample(tmp_path / "a.jsonl").check.texts
    write(tmp_path / "a.jsonl", blank + jsonl(TEXTS))
    found = sample(tmp_path / "a.jsonl")
    assert not found.check.texts
    assert found.tokens is None


def test_few_files_are_opened_and_evenly_chosen() -> None:
    assert evenly(3, 4) == [0, 1, 2]
    assert evenly(100, 4) == [0, 25, 50, 75]
    assert evenly(5, 4) == [0, 1, 2, 3]


def test_files_without_text_are_passed_over(tmp_path: Path) -> None:
    """Every other file is empty or blank: even distances alone would hit only those."""
    for part in range(16):
        write(tmp_path / f"{part:02}.jsonl", (b"", b"\n" * 9)[part % 4 // 2])
        write(tmp_path / f"{part:02}x.jsonl", jsonl(TEXTS))
    found = sample(tmp_path / "*.jsonl")
    assert found.check.texts > 400
    assert found.tokens == pytest.approx(16 * TOKENS, rel=0.02)
    assert sample(tmp_path / "*0.jsonl").check.texts == 0


def test_bad_rows_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b'{broken\n{"text": "\xff"}\n\n' + jsonl(["", *TEXTS]))
    assert sample(tmp_path / "a.jsonl").check.texts == len(TEXTS)


# --- What is lost --------------------------------------------------------------------------------

MIXED = ["only small \u041f\u0440\u0438 letters \U0001f600 here", "all of it is known"]
LOST = Counter("\u041f\u0440\u0438\U0001f600")


def words_only(unknown: str | None) -> object:
    """A BPE that knows small latin letters and drops, or replaces, all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    engine = Tokenizer(models.BPE(**({"unk_token": unknown} if unknown else {})))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ("</s>", *([unknown] if unknown else []))
    return trained(engine, special, "abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_what_a_bpe_drops_or_replaces_is_lost(tmp_path: Path, unknown: str | None) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "t.json", words_only(unknown)))
    assert check_texts(tokenizer, MIXED).unknown == LOST


def test_what_a_sentencepiece_model_does_not_know_is_lost(tmp_path: Path) -> None:
    path = sentencepiece_model(
        tmp_path / "t.model", "abcdefghijklm nopqrstuvwxyz", 40, byte_fallback=False
    )
    check = check_texts(load_tokenizer(path), MIXED)
    assert check.unknown == LOST
    assert check.unknown_share == pytest.approx(4 / sum(len(t.replace(" ", "")) for t in MIXED))


@pytest.mark.parametrize("name", ["metaspace first", "prepend", "each word"])
def test_a_space_before_a_word_does_not_make_it_known(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "t.json", ENGINES[name]()))
    assert check_texts(tokenizer, ["the \u041f\u0440\u0438 fox"]).unknown == Counter(
        "\u041f\u0440\u0438"
    )


def test_words_that_a_word_piece_model_has_not_are_lost_whole(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = {"[UNK]": 0, "</s>": 1, "the": 2, "fox": 3, "##es": 4}
    engine = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))  # type: ignore[call-arg]
    engine.normalizer = normalizers.BertNormalizer()
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = load_tokenizer(save(tmp_path / "t.json", engine))
    check = check_texts(tokenizer, ["The FOXES", "the dog"])
    assert check.unknown == Counter("dog")
    assert check.changed == Counter("TFOXES") - Counter("es"), "lower case is a change, no loss"


def test_nothing_is_lost_where_each_byte_has_a_token(tmp_path: Path) -> None:
    for engine in (byte_level(), byte_level(add_prefix_space=True)):
        engine.decoder = None  # what comes back then is not the text, and none of it is lost
        tokenizer = load_tokenizer(save(tmp_path / "t.json", engine))
        assert not check_texts(tokenizer, MIXED).unknown


def test_what_changes_is_named(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path / "t.model", remove_extra_whitespaces=False)
    check = check_texts(load_tokenizer(path), [f"{TEXT} \u2581\u2581", "a \ufb01"])
    assert (check.texts, check.exact, check.unknown) == (2, 0, Counter())
    assert check.verdict() == (
        '2 of 2 texts decode to something else ("\u2581" U+2581 2 times, "\ufb01" U+FB01 once)'
    )
    assert name_characters(Counter("\x00")) == "U+0000 once"
    assert name_characters(Counter("abcdefgg")) == (
        '"g" U+0067 2 times, "a" U+0061 once, "b" U+0062 once, "c" U+0063 once, "d" U+0064 once '
        "and 2 other characters"
    )


def test_a_sample_is_the_same_each_time(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", json.dumps(TEXTS).encode())
    one, other = sample(tmp_path / "a.txt"), sample(tmp_path / "a.txt")
    assert (one.check, one.tokens) == (other.check, other.tokens)
