import json
from typing import Any

import pytest

from megapipe.conversion.sentencepiece.model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ModelPiece,
    SentencePieceModel,
)
from megapipe.conversion.sentencepiece.tree import tokenizer_tree
from megapipe.errors import ConversionError

KINDS = (UNKNOWN, CONTROL, NORMAL, USER_DEFINED, UNUSED, BYTE)


def model(kind: str, *pieces: tuple[str, float, int], **settings: Any) -> SentencePieceModel:
    texts = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), *pieces]
    plain: dict[str, Any] = {
        "byte_fallback": False,
        "charsmap": b"",
        "adds_space": False,
        "squeezes": False,
        "escapes_spaces": True,
    }
    made = tuple(ModelPiece(*piece) for piece in texts)
    return SentencePieceModel(b"", kind, made, **plain | settings)


def ids(tree: dict[str, Any], text: str) -> list[int]:
    from tokenizers import Tokenizer

    engine = Tokenizer.from_str(json.dumps(tree))
    engine.encode_special_tokens = True
    encoding: list[int] = engine.encode(text, add_special_tokens=False).ids
    return encoding


def test_merges_are_the_splits_of_pieces_best_first() -> None:
    letters = [(letter, -9.0, NORMAL) for letter in "abc"]
    tree = tokenizer_tree(model("bpe", *letters, ("abc", -2.0, NORMAL), ("bc", -1.0, NORMAL)))
    assert tree["model"]["merges"] == [["b", "c"], ["a", "bc"]]
    assert ids(tree, "abcab") == [5, 2, 3]


def test_a_step_over_an_unused_piece_is_refused() -> None:
    letters = [(letter, -9.0, NORMAL) for letter in "ab"]
    with pytest.raises(ConversionError, match="its piece 'ab' is unused and a step to others"):
        tokenizer_tree(model("bpe", *letters, ("ab", -1.0, UNUSED)))


def test_reserved_pieces_are_no_part_of_a_text() -> None:
    letters = [(letter, -9.0, NORMAL) for letter in "s>"]
    known = tokenizer_tree(model("unigram", ("<", -9.0, NORMAL), *letters))
    assert ids(known, "<s>") == [2, 3, 4]
    unknown = tokenizer_tree(model("unigram", *letters))
    assert ids(unknown, "<s><<") == [0, 2, 3, 0]


def test_unknown_characters_of_reserved_pieces_become_bytes() -> None:
    in_bytes = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    letters = [(letter, -9.0, NORMAL) for letter in "s>"]
    tree = tokenizer_tree(model("unigram", *letters, *in_bytes, byte_fallback=True))
    assert ids(tree, "<s>") == [4 + ord("<"), 2, 3]


def test_spaces_are_kept_or_squeezed() -> None:
    pieces = [(letter, -9.0, NORMAL) for letter in "\u2581a"]
    kept = tokenizer_tree(model("bpe", *pieces, adds_space=True))
    assert [ids(kept, text) for text in ("", " ", " a")] == [[], [2, 2], [2, 2, 3]]
    squeezed = tokenizer_tree(model("bpe", *pieces, adds_space=True, squeezes=True))
    assert [ids(squeezed, text) for text in ("", " ", "  a  a ")] == [[], [], [2, 3, 2, 3]]
