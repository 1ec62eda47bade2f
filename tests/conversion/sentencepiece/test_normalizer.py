import json
import random
import unicodedata
from collections.abc import Callable

import pytest

from megapipe.conversion.sentencepiece.model import read_model
from megapipe.conversion.sentencepiece.normalizer import SEPARATOR, charsmap_steps
from tests.conversion.sentencepiece.samples import trained

Pair = tuple[Callable[[str], str], Callable[[str], str]]


@pytest.fixture(scope="module")
def normalizers() -> Pair:
    """Sentencepiece's nmt_nfkc, and ours."""
    from tokenizers import Tokenizer, models

    model = read_model(trained(model_type="bpe"))
    tree = json.loads(Tokenizer(models.BPE()).to_str())
    steps = charsmap_steps(model.charsmap, model.replaced)
    tree["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return model.replaced, Tokenizer.from_str(json.dumps(tree)).normalizer.normalize_str


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\r\n",
        "\ufb01\u0301",
        "\u212b\u0301",
        "a\u0301\u0302\u0323",
        "u\u0308\u0304",
        "u\u0323\u031b",
        "\n\u0301\u0302",
        "\u0301\u0302",
        "か\u3099 \uff76\uff9e \u30cf\u309a",
        "\u1100\u1161\u11a8 \u3131\u314f\u3134",
        "\u0628\u0651\u064e",
        "\u2122\ufe0f\u200d",
        SEPARATOR,
        f"a{SEPARATOR} \ufb01{SEPARATOR}b",
        "\uff5e \u2581 \u200c",
    ],
)
def test_marks_and_clusters(normalizers: Pair, text: str) -> None:
    theirs, ours = normalizers
    assert ours(text) == theirs(text)


def test_every_character(normalizers: Pair) -> None:
    theirs, ours = normalizers
    codes = [*range(0x3400), *range(0xF900, 0x10000), *range(0x1D000, 0x1F300)]
    assert [code for code in codes if ours(chr(code)) != theirs(chr(code))] == []


def test_decomposed_texts(normalizers: Pair) -> None:
    theirs, ours = normalizers
    chooser = random.Random(1)
    letters = [chr(code) for code in [*range(0xC0, 0x250), *range(0x1E00, 0x1F00)]]
    letters += [chr(code) for code in range(0xAC00, 0xD7A4, 97)]
    for _ in range(200):
        text = unicodedata.normalize("NFD", "".join(chooser.choices(letters, k=20)))
        assert ours(text) == theirs(text)
