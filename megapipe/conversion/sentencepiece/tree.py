"""A sentencepiece model as the tree of a tokenizer.json.

Where the `tokenizers` library works otherwise than sentencepiece, the tree makes up for it:

    BPE         sentencepiece merges any two neighbours that are a piece together, best score first:
                each split of each piece into two is a merge
    user-       are never merged with anything: they are words of their own, and a word that is a
    defined     token as a whole is taken as it is
    reserved    pieces (control, byte, unknown, unused) are never found in text: in Unigram models
                their score is lower than that of their characters one by one

One difference is left. Where two ways to cut a text score the same ("aaa" is "aa" and "a", or "a"
and "aa"), a Unigram model of sentencepiece takes the one that its sums in float32 happen to favour.
The library adds in float64, and takes the one with the longer piece at the end.
"""

from collections.abc import Iterator
from typing import Any

from megapipe.conversion.sentencepiece.model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)
from megapipe.conversion.sentencepiece.normalizer import (
    Step,
    any_of,
    charsmap_steps,
    literal,
    replace,
    replace_text,
)
from megapipe.data.sentencepiece_tokenizer import META_SPACE
from megapipe.errors import ConversionError

RESERVED = (CONTROL, BYTE, UNKNOWN, UNUSED)
NO_CHARACTER = "\ufdd1"
"""A code point that Unicode keeps free: it is unknown to any model."""
MANY = 1 << 16
"""More spaces than there are at the beginning of a text."""
BONUS = -0.1
"""What sentencepiece takes for the score of a user-defined piece, above that of all others."""
FINE = 10.0
"""How much less than the worst piece an unknown character scores, in both libraries."""


def tokenizer_tree(model: SentencePieceModel) -> dict[str, Any]:
    """The tree. Raises ConversionError, naming what it is, for a model that has none."""
    steps, words = _spaces(model), _words(model)
    if model.kind == "unigram" and (strange := _strange_characters(model)):
        if model.byte_fallback:
            words = [_split(any_of(strange))]
        else:
            steps.append(replace(any_of(strange), NO_CHARACTER))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(id_, piece.text)
            for id_, piece in enumerate(model.pieces)
            if piece.kind in (CONTROL, UNKNOWN)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words} if words else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _bpe(model) if model.kind == "bpe" else _unigram(model),
    }


def _added_token(id_: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": text, **flags, "special": True}


# --- Text before it is cut -----------------------------------------------------------------------


def _spaces(model: SentencePieceModel) -> list[Step]:
    """Normalisers: the table of the model, and what it does to spaces."""
    table = charsmap_steps(model.charsmap, model.replaced) if model.charsmap else []
    space = META_SPACE if model.escapes_spaces else " "
    escape = [replace_text(" ", META_SPACE)] if model.escapes_spaces else []
    first = [{"type": "Prepend", "prepend": space}] if model.adds_space else []
    if not model.squeezes:
        # First, since sentencepiece adds a space to a text that the table makes empty, too.
        first = [{"type": "Prepend", "prepend": " "}] if model.adds_space else []
        return [*first, *table, *escape]
    squeeze = replace(rf"\A +|(?<= ) +|{any_of(' ' + space)}+\z", "")
    return [*table, squeeze, *first, *escape]


def _words(model: SentencePieceModel) -> list[Step]:
    """Pre-tokenisers that make each user-defined piece of a BPE model a word of its own."""
    symbols = sorted(model.texts(USER_DEFINED), key=lambda text: (-len(text), text))
    if model.kind != "bpe" or not symbols:
        return []
    any_symbol = "|".join(map(literal, symbols))
    # A word that is the text of a reserved piece would be that piece. It is cut once more.
    cuts = []
    for text in model.texts(*RESERVED):
        first, *rest = model.bare.encode(text, out_type=str)
        if rest and text.startswith(first):
            cuts.append(f"{literal(first)}(?={literal(text[len(first) :])}(?:\\z|{any_symbol}))")
    whole = f"|(?<=\\A|{any_symbol})(?:{'|'.join(cuts)})" if cuts else ""
    return [_split(f"{any_symbol}{whole}")]


def _split(pattern: str) -> Step:
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}


def _decoders(model: SentencePieceModel) -> list[Step]:
    decoders: list[Step] = [replace_text(META_SPACE, " ")]
    if model.byte_fallback:
        decoders.append({"type": "ByteFallback"})
    decoders.append({"type": "Fuse"})
    if model.adds_space or model.squeezes:
        spaces = MANY if model.squeezes else 1
        decoders.append({"type": "Strip", "content": " ", "start": spaces, "stop": 0})
    return decoders


# --- BPE -----------------------------------------------------------------------------------------


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.unknown].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": not model.byte_fallback,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": bool(model.texts(USER_DEFINED)),
        "vocab": {piece.text: id_ for id_, piece in enumerate(model.pieces)},
        "merges": [list(pair) for pair in _merges(model)],
    }


def _merges(model: SentencePieceModel) -> Iterator[tuple[str, str]]:
    """Each split of a piece into two symbols, best piece first."""
    normal, unused = set(model.texts(NORMAL)), set(model.texts(UNUSED))
    single = {piece.text for piece in model.pieces if len(piece.text) == 1}
    symbols = (normal | single) - set(model.texts(USER_DEFINED))
    ranked = sorted(enumerate(model.pieces), key=lambda item: (-item[1].score, item[0]))
    for _, piece in ranked:
        text = piece.text
        if text not in normal and text not in unused:
            continue
        for cut in range(1, len(text)):
            if text[:cut] in symbols and text[cut:] in symbols:
                if text in unused:
                    raise ConversionError(f"its piece {text!r} is unused and a step to others")
                yield text[:cut], text[cut:]


# --- Unigram -------------------------------------------------------------------------------------


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    scores = [piece.score for piece in model.pieces if piece.kind == NORMAL]
    worst, best = min(scores, default=0.0), max([*scores, 0.0])
    longest = max(len(text) for text in model.texts(*RESERVED))
    never = longest * min(worst, 0.0) - FINE
    vocabulary = []
    for piece in model.pieces:
        score = never if piece.kind in RESERVED else piece.score
        if piece.kind == USER_DEFINED:
            score = len(piece.text.encode()) * best + BONUS
        vocabulary.append([piece.text, score])
    return {
        "type": "Unigram",
        "unk_id": model.unknown,
        "vocab": vocabulary,
        "byte_fallback": model.byte_fallback,
    }


def _strange_characters(model: SentencePieceModel) -> set[str]:
    """Characters of reserved pieces that the model doesn't know.

    A reserved piece scores better than its characters one by one if those are unknown, so that such
    a character must not come before the model in one word with the others.
    """
    known = {text for text in model.texts(NORMAL, USER_DEFINED) if len(text) == 1}
    return {character for text in model.texts(*RESERVED) for character in text} - known
