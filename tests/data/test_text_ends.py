"""A document tokenised in parts is what it is as a whole, whatever a tokenizer does at its ends."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megapipe.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.tokenizer_samples import byte_level, save, sentencepiece_model, trained

LINE = "the quick  brown fox jumps over the lazy dog\n"
TEXT = LINE * 3 + "\n  and runs away \n" + LINE * 2 + "  away"
SPECIAL = ("<unk>", "</s>")
LETTERS = [*map(chr, range(32, 127)), "\n", "\u2581"]


def metaspace(scheme: str) -> Any:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers

    engine = Engine(models.BPE(unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    engine.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return trained(engine, SPECIAL, alphabet=LETTERS)


def prepending() -> Any:
    """As the converted Llama 2: the normaliser puts the space there, nothing splits the text."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, normalizers

    engine = Engine(models.BPE(unk_token="<unk>"))
    engine.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    engine.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return trained(engine, SPECIAL, alphabet=LETTERS)


def stripping() -> Any:
    from tokenizers import normalizers

    engine = byte_level()
    engine.normalizer = normalizers.Strip(left=True, right=True)
    return engine


def each_word() -> Any:
    """As converted T5 and XLM-R: the text is split first, and each word gets its space."""
    from tokenizers import pre_tokenizers

    engine = metaspace("always")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    return engine


ENGINES: dict[str, Callable[[], Any]] = {
    "plain": byte_level,
    "space before": lambda: byte_level(add_prefix_space=True),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "prepend": prepending,
    "strip": stripping,
    "each word": each_word,
}
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "identity": {"normalization_rule_name": "identity"},
    "Llama 2": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no prefix": {"add_dummy_prefix": False},
    "suffix": {"treat_whitespace_as_suffix": True},
    "lossless": {
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    },
}


@pytest.fixture(params=[*ENGINES, *(f"sentencepiece, {name}" for name in MODELS)])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    name = request.param
    if name in ENGINES:
        return load_tokenizer(save(tmp_path / "t.json", ENGINES[name]()))
    settings = MODELS[name.removeprefix("sentencepiece, ")]
    return load_tokenizer(sentencepiece_model(tmp_path / "t.model", **settings))


def in_parts(tokenizer: Tokenizer, text: str, cuts: list[int]) -> list[int]:
    bounds = [0, *cuts, len(text)]
    ids = []
    for start, end in pairwise(bounds):
        ids += tokenizer.encode_part(text, start, end)
    return ids


def test_cuts_behind_line_ends_change_no_id(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode(TEXT)
    ends = [place + 1 for place, character in enumerate(TEXT[:-1]) if character == "\n"]
    for cut in ends:
        assert in_parts(tokenizer, TEXT, [cut]) == whole, cut
    assert in_parts(tokenizer, TEXT, ends) == whole


def test_cuts_anywhere_change_no_text(tokenizer: Tokenizer) -> None:
    whole = tokenizer.decode(tokenizer.encode(TEXT))
    for cut in range(1, len(TEXT)):
        assert tokenizer.decode(in_parts(tokenizer, TEXT, [cut])) == whole, cut
    words = "thequickbrownfox" * 3
    parts = tokenizer.decode(in_parts(tokenizer, words, [5, 20, 21]))
    assert parts == tokenizer.decode(tokenizer.encode(words))


def test_a_whole_text_is_a_part_of_itself(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_part(TEXT, 0, len(TEXT)) == tokenizer.encode(TEXT)
