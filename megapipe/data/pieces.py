"""From a row to the tokens that training sees: may it be read, and where is its text cut.

Training and `megapipe data audit` both go through here, so that they count the same.
"""

from collections.abc import Iterator

from megapipe.data.exclusions import Exclusions, is_excluded
from megapipe.data.rows import Account
from megapipe.data.sources import Keeps, Source, SourceFile
from megapipe.data.splitters import Raw, Unreadable
from megapipe.data.tokenizer import Tokenizer
from megapipe.data.units import Unit

PIECE = 1 << 15
"""Characters that are tokenised at once. Sentencepiece encodes 4.4 MB/s in pieces of this size and
1.9 MB/s in pieces of a million; and no more than this is tokenised again on resume."""


def usable_text(
    source: Source,
    file: SourceFile,
    unit: Unit,
    raw: Raw,
    *,
    keeps: Keeps,
    exclusions: Exclusions | None,
    account: Account,
) -> str | None:
    """The text of a row if it is to be read; counts in `account` rows that are empty or excluded.

    Raises BadRowError for a bad row, which the caller counts.
    """
    assert file.rows is not None
    damage = isinstance(raw.value, Unreadable)  # reported by who trains and by who validates
    if not damage and not keeps(file.key, unit.start, raw.address):
        return None
    text = source.text(file.rows, raw.value)
    if not text:
        account.empty_rows += text == ""
        return None
    if exclusions is not None and is_excluded(exclusions, file.rows, raw, source.config, text):
        account.excluded_rows += 1
        return None
    return text


def piece_end(text: str, start: int) -> int:
    """Pieces end behind a line end where there is one: tokens then hardly depend on the cut."""
    end = min(start + PIECE, len(text))
    if end == len(text):
        return end
    newline = text.rfind("\n", start, end)
    return end if newline < 0 else newline + 1


def piece_tokens(tokenizer: Tokenizer, text: str, start: int, end: int) -> list[int]:
    """The tokens of one piece of a document; the last one ends with the end-of-document token."""
    tokens = tokenizer.encode_part(text, start, end)
    if end == len(text):
        tokens.append(tokenizer.end_of_document)
    return tokens


def token_count(tokenizer: Tokenizer, text: str) -> int:
    """How many tokens a document has in training, the end-of-document token included."""
    return sum(len(piece_tokens(tokenizer, text, *piece)) for piece in _pieces(text))


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        end = piece_end(text, start)
        yield start, end
        start = end
