"""What a tokenizer of the `tokenizers` library does at the ends of a text, and switching it off.

Some put a space before a text or strip spaces at its ends. A document that is tokenised in parts
must get that at its own ends only. Both functions work on the parsed tokenizer.json:

    normaliser     Prepend, Strip
    pre-tokeniser  Metaspace and ByteLevel, which put a space before the text; where another
                   pre-tokeniser has cut the text before them, they do so before each word
"""

from collections.abc import Mapping
from typing import Any

Tree = Mapping[str, Any]


def changes_ends(tree: Tree) -> bool:
    """Whether anything happens at the beginning or the end of a text."""
    strips = any(part["type"] in ("Prepend", "Strip") for part in _parts(tree, "normalizer"))
    return strips or any(map(_puts_space, _parts(tree, "pre_tokenizer")))


def puts_space_before_words(tree: Tree) -> bool:
    """Whether each word gets a space, so that one is right behind a cut between words."""
    return any(
        _puts_space(part) and part.get("prepend_scheme") != "first"
        for part in _parts(tree, "pre_tokenizer")[1:]
    )


def without_ends(tree: Tree, *, begin: bool, end: bool, words: bool = False) -> dict[str, Any]:
    """The tree of a tokenizer that adds and strips nothing at the beginning, or at the end.

    `words` switches off what is put before each word as well.
    """
    changed = dict(tree)
    normalizers = [dict(part) for part in _parts(tree, "normalizer")]
    if begin:
        normalizers = [part for part in normalizers if part["type"] != "Prepend"]
    for part in normalizers:
        if part["type"] == "Strip":
            part["strip_left"] = part["strip_left"] and not begin
            part["strip_right"] = part["strip_right"] and not end
    if tree.get("normalizer"):
        changed["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    if begin and tree.get("pre_tokenizer"):
        parts = _parts(tree, "pre_tokenizer")
        whole_text = [words or place == 0 or _only_first(part) for place, part in enumerate(parts)]
        changed["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                _without_space(part) if off else part
                for part, off in zip(parts, whole_text, strict=True)
            ],
        }
    return changed


def _parts(tree: Tree, name: str) -> list[Tree]:
    """The parts of a normaliser or pre-tokeniser in order, out of the sequences they stand in."""
    pending, parts = [tree.get(name)], []
    while pending:
        part = pending.pop(0)
        if part is None:
            continue
        if part["type"] == "Sequence":
            pending = [*(part.get("normalizers") or part.get("pretokenizers") or []), *pending]
        else:
            parts.append(part)
    return parts


def _puts_space(part: Tree) -> bool:
    if part["type"] == "Metaspace" and "prepend_scheme" in part:
        return bool(part["prepend_scheme"] != "never")
    return part["type"] in ("Metaspace", "ByteLevel") and bool(part.get("add_prefix_space", True))


def _only_first(part: Tree) -> bool:
    return part["type"] == "Metaspace" and part.get("prepend_scheme") == "first"


def _without_space(part: Tree) -> dict[str, Any]:
    changed = dict(part)
    if part["type"] == "ByteLevel":
        changed["add_prefix_space"] = False
    if part["type"] == "Metaspace":
        changed.pop("add_prefix_space", None)  # its name in older files
        changed["prepend_scheme"] = "never"
    return changed
