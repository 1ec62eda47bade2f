"""What a sentencepiece model does to text before it looks for pieces, with `tokenizers`' parts.

Sentencepiece replaces, at each place of a text, the longest key of its table: single characters,
and sequences that Unicode composes into one ("e" and U+0301). `Precompiled` reads the same table,
but looks at user-perceived characters (grapheme clusters) and takes the shortest key, so that marks
get lost ("ﬁ" and U+0301), and sequences of 6 bytes or more are not composed. Therefore:

    1. a separator before each mark makes every character a cluster of its own (and one behind each
       control character, for a moment, keeps marks there from being a cluster)
    2. `Precompiled` with the table of the model is now exact
    3. separators go where the table has the sequence, and NFC composes what is joined
    4. the other separators go

Separators are code points that Unicode keeps free of any character.
"""

import functools
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megapipe.conversion.sentencepiece.charsmap import build_charsmap, precompiled

Normalize = Callable[[str], str]
Step = dict[str, Any]
SEPARATOR = "\ufdd0"
FIXED = "\ufdd2"
"""A separator that stays: what is before it becomes several characters, and none that composes."""
JOINED = "\u200d\u0e33\u0eb3\uff9e\uff9f" + "".join(
    map(chr, [*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080)])
)
"""Characters that are no marks and yet belong to what is before them in a grapheme cluster."""
APART = set(
    map(
        chr,
        [0x102B, 0x102C, 0x1038, *range(0x1062, 0x1065), *range(0x1067, 0x106E), 0x1083]
        + [*range(0x1087, 0x108D), 0x108F, *range(0x109A, 0x109D), 0x1A61, 0x1A63, 0x1A64]
        + [0xAA7B, 0xAA7D, 0x11720, 0x11721],
    )
)
"""Marks that don't."""
BEFORE = set(map(chr, [*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD]))
"""Format characters that join what follows them; behind the others a cluster starts anew."""


def replace(pattern: str, content: str) -> Step:
    """A normaliser that replaces matches of a regular expression (of Oniguruma's)."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def replace_text(text: str, content: str) -> Step:
    """A normaliser that replaces a text."""
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def literal(text: str) -> str:
    """The regular expression that matches exactly `text`."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def any_of(characters: Iterable[str]) -> str:
    """The regular expression that matches any of the characters."""
    ranges: list[list[int]] = []
    for code in sorted(set(map(ord, characters))):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in ranges) + "]"


def charsmap_steps(charsmap: bytes, normalize: Normalize) -> list[Step]:
    """Normalisers that replace what the table of a model replaces.

    `normalize` does it by sentencepiece, without any treatment of spaces.
    """
    becomes = {mark: normalize(mark) for mark in _marks()}
    marks = [mark for mark, text in sorted(becomes.items()) if not text.startswith(" ")]
    after = set(_marks()) | {becomes[mark][0] for mark in marks if becomes[mark]}
    controls = _controls()
    several = [one for one in _characters() if len(normalize(one)) > 1]
    separator = literal(SEPARATOR)
    steps = [
        {"type": "Prepend", "prepend": SEPARATOR},
        precompiled(build_charsmap({one: one + SEPARATOR for one in controls})),
        precompiled(build_charsmap({one: SEPARATOR + one for one in marks})),
        replace(rf"\A{separator}|(?<={any_of(controls)}){separator}", ""),
        replace(f"(?<={any_of(several)}){separator}(?={any_of(marks)})", FIXED),
        precompiled(charsmap),
        replace(_joints(normalize), ""),
        {"type": "NFC"},
        replace(f"{any_of(SEPARATOR + FIXED)}(?={any_of(after)})", ""),
    ]
    if normalize("\r") == normalize("\n") != "\n":
        steps.insert(0, replace_text("\r\n", "\n\n"))  # one cluster, of two characters
    return steps


@functools.cache
def _marks() -> frozenset[str]:
    characters = (one for one in _characters() if unicodedata.category(one)[0] == "M")
    return frozenset(itertools.chain(characters, JOINED)) - APART


@functools.cache
def _controls() -> tuple[str, ...]:
    kinds = ("Cc", "Cf", "Zl", "Zp")
    controls = (one for one in _characters() if unicodedata.category(one) in kinds)
    others = {"\0"} | BEFORE | _marks()
    return tuple(one for one in controls if one not in others)


def _characters() -> Iterator[str]:
    """All that can be marks, format characters, compositions or short for several characters:
    not the ideographs, Hangul syllables and code points for private use."""
    parts = (0, 0x3400), (0xA000, 0xAC00), (0xD7B0, 0xD800), (0xF900, 0x20000), (0xE0000, 0xE0200)
    codes = itertools.chain.from_iterable(itertools.starmap(range, parts))
    return map(chr, codes)


def _joints(normalize: Normalize) -> str:
    """The regular expression of separators between a character and a mark that the table composes.

    Hangul needs none: its letters are no marks, and NFC composes them wherever the table does.
    """
    befores: dict[str, set[str]] = {}
    for sequence in _compositions():
        first, last = sequence[:-1], sequence[-1]
        composes = normalize(sequence) != normalize(first) + normalize(last)
        if composes and all(normalize(one) == one for one in sequence):
            befores.setdefault(last, set()).add(first)
    alike: dict[frozenset[str], list[str]] = {}
    for mark, found in befores.items():
        alike.setdefault(frozenset(found), []).append(mark)
    separator = literal(SEPARATOR)
    choices = []
    for firsts, marks in sorted(alike.items(), key=lambda pair: min(pair[1])):
        singles = [one for one in firsts if len(one) == 1]
        behind = [any_of(singles)] if singles else []
        behind += [separator.join(map(literal, one)) for one in sorted(firsts) if len(one) > 1]
        choices.append(f"(?={any_of(marks)})(?<={'|'.join(one + separator for one in behind)})")
    return f"{separator}(?:{'|'.join(choices)})"


@functools.cache
def _compositions() -> frozenset[str]:
    """Sequences that Unicode composes into one character, marks in every order, Hangul apart."""
    found = set()
    for character in _characters():
        parts = unicodedata.normalize("NFD", character)
        if len(parts) == 1 or unicodedata.normalize("NFC", character) != character:
            continue
        for base, *marks in ((parts[0], *order) for order in itertools.permutations(parts[1:])):
            for joined in range(len(marks)):
                first = unicodedata.normalize("NFC", base + "".join(marks[:joined]))
                sequence = first + "".join(marks[joined:])
                if len(first) == 1 and unicodedata.normalize("NFC", sequence) == character:
                    found.add(sequence)
    return frozenset(found)
