"""Two tokenizers are the same where they give the same ids, in whatever format they lie."""

from pathlib import Path
from typing import Any

import pytest

from megapipe.conversion.tokenizer import export_tokenizer
from megapipe.conversion.tokenizer_difference import tokenizer_difference
from megapipe.data.tokenizer import load_tokenizer
from tests.conversion.sentencepiece.samples import KINDS, trained
from tests.data.tokenizer_samples import TEXT, byte_level, save


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_model_and_its_export_are_the_same(tmp_path: Path, kind: str) -> None:
    (tmp_path / "m.model").write_bytes(trained(**KINDS[kind]))
    ours = load_tokenizer(tmp_path / "m.model")
    export_tokenizer(ours, tmp_path, allow_drift=False, max_length=10)
    theirs = load_tokenizer(tmp_path / "tokenizer.json")
    assert ours.sha256 != theirs.sha256
    assert tokenizer_difference(ours, theirs) is None


ENDS = ("</s>", "<s>")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"size": 281}, "280 tokens here, 281 there"),
        ({"special": ENDS[::-1]}, "documents end with token 0 here, 1 there"),
        ({"add_prefix_space": True}, "'\\t': ids from number 0 on "),
        ({"text": TEXT[::-1]}, "ids from number "),
    ],
)
def test_what_differs_is_named(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    base: dict[str, Any] = {"special": ENDS, "size": 280}
    here, there = (
        load_tokenizer(save(tmp_path / name, byte_level(**(base | settings))))
        for name, settings in (("here.json", {}), ("there.json", other))
    )
    difference = tokenizer_difference(here, there)
    assert difference is not None
    assert said in difference
