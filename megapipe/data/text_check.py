"""What a tokenizer makes of text: tokens per byte, what it does not know, what it changes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from megapipe.amounts import counted
from megapipe.data.tokenizer import Tokenizer

SHOWN = 5


@dataclass
class TextCheck:
    """Counts over the texts that were looked at.

    unknown: characters that are lost: without a token, or with the unknown one
    changed: other characters that did not come back, or not as often, from the tokens
    """

    texts: int = 0
    exact: int = 0
    size: int = 0  # bytes
    tokens: int = 0
    characters: int = 0  # spaces aside
    unknown: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "TextCheck") -> "TextCheck":
        return TextCheck(
            self.texts + other.texts,
            self.exact + other.exact,
            self.size + other.size,
            self.tokens + other.tokens,
            self.characters + other.characters,
            self.unknown + other.unknown,
            self.changed + other.changed,
        )

    @property
    def unknown_share(self) -> float:
        """Of the characters, spaces aside."""
        return self.unknown.total() / max(self.characters, 1)

    @property
    def bytes_per_token(self) -> float:
        return self.size / max(self.tokens, 1)

    def summary(self) -> str:
        """Bytes per token, what is unknown, and whether texts come back as they were."""
        return f"{self.bytes_per_token:.2f} bytes per token; {self.verdict()}"

    def verdict(self) -> str:
        """In words, as the end of a sentence: what is unknown, and what does not come back."""
        parts = []
        if self.unknown:
            parts.append(
                f"{share(self.unknown_share)} of its characters are unknown to the tokenizer and "
                f"lost ({name_characters(self.unknown)})"
            )
        if self.changed:
            parts.append(
                f"{self.texts - self.exact:,} of {self.texts:,} texts decode to something else "
                f"({name_characters(self.changed)})"
            )
        elif self.exact < self.texts and not self.unknown:
            parts.append(
                f"{self.texts - self.exact:,} of {self.texts:,} texts decode to something else"
            )
        return "; ".join(parts) or "all of it decodes to the same text"


def check_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> TextCheck:
    """Tokenise each text and turn the tokens back into text."""
    found = TextCheck()
    for text in texts:
        ids = tokenizer.encode(text)
        back = tokenizer.decode(ids)
        unknown = Counter(tokenizer.unknown(text))
        found += TextCheck(
            texts=1,
            exact=int(back == text),
            size=len(text.encode()),
            tokens=len(ids),
            characters=sum(not character.isspace() for character in text),
            unknown=unknown,
            changed=Counter(text) - Counter(back) - unknown if back != text else Counter(),
        )
    return found


def name_characters(counts: Counter[str]) -> str:
    """`"▁" U+2581 12 times, U+200B once`: the most frequent ones, and how many others there are."""
    # Equally frequent ones in order, so that the same text gives the same words.
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    named = [
        f"{name_character(one)} {'once' if count == 1 else f'{count:,} times'}"
        for one, count in ordered[:SHOWN]
    ]
    more = len(ordered) - SHOWN
    others = f" and {counted(more, 'other character')}" if more > 0 else ""
    return ", ".join(named) + others


def name_character(character: str) -> str:
    code = f"U+{ord(character):04X}"
    return f'"{character}" {code}' if character.isprintable() and character != " " else code


def share(value: float) -> str:
    """A share in percent, with enough digits to tell it from none."""
    percent = 100 * value
    if percent >= 1:
        return f"{percent:.1f}%"
    return f"{percent:.2g}%"
