"""A small sample of a source, read before training begins: how much text it is, and what text.

The reading is its own: it changes nothing of what a feed reads. A few files, evenly chosen, are
read at their beginning, so the same files give the same sample, and its cost does not grow with
the corpus.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megapipe.data.files import COMPRESSED, FoundFile, file_format, open_unchanged
from megapipe.data.formats import RowFile
from megapipe.data.rows import BadRowError, row_text
from megapipe.data.sources import Source
from megapipe.data.text_check import TextCheck, check_texts
from megapipe.data.tokenizer import Tokenizer

SAMPLE_BYTES = 256 << 10
"""Of all sources together."""
LEAST_BYTES = 4 << 10
"""Of one source, however many there are."""
MOST_ROWS = 4096
"""Of one file: rows without text are passed over, and a file may have nothing else."""
MOST_STORED = 64
"""How many times the size of its sample is read of a file, but at least one row."""
FILES = 4
"""With text, per source: opening each costs a few milliseconds, more on a network disk."""
TRIES = 16
"""Files opened per source while fewer than FILES have given text."""


@dataclass(frozen=True)
class SourceSample:
    """`check` is of the sampled text; `stored` is the size of the files in bytes, None on the hub;
    `tokens` is an estimate for the whole source, None where that can't be told; `assumption` says
    what the estimate takes for granted."""

    source: Source
    check: TextCheck
    stored: int | None
    tokens: float | None
    assumption: str = ""


def sample_sources(sources: Sequence[Source], tokenizer: Tokenizer) -> list[SourceSample]:
    """One sample each. Raises DataError where a file can't be opened."""
    size = max(LEAST_BYTES, SAMPLE_BYTES // max(len(sources), 1))
    return [sample_source(source, tokenizer, size) for source in sources]


def sample_source(source: Source, tokenizer: Tokenizer, size: int) -> SourceSample:
    """Reads about `size` bytes of text out of FILES files that have some."""
    if source.found is None:  # on the hub: it would be downloaded once more
        return SourceSample(source, TextCheck(), None, None)
    chosen, read = _read(source, source.found.files, size)
    check = check_texts(tokenizer, [part.text for part in read])
    documents = sum(part.share for part in read)
    stored = source.found.size
    if source.total_bytes is None or not documents:
        return SourceSample(source, check, stored, None)
    tokens = check.tokens + documents  # each whole document gets an end token
    forms = {_form(source, file.path) for file in chosen}
    if forms == {"parquet"}:
        looked_at = sum(file.size for file in chosen)
        per_byte = tokens / documents * sum(map(_row_count, chosen)) / max(looked_at, 1)
        return SourceSample(source, check, stored, per_byte * stored)
    per_byte = tokens / sum(part.share * part.stored for part in read)
    assumption = ""
    if forms & {"arrow", "parquet"}:
        assumption = "if the tables hold nothing but text"
    elif any(file.path.suffix in COMPRESSED for file in chosen):
        assumption = "if files unfold to 4 times their size"
    return SourceSample(source, check, stored, per_byte * source.total_bytes, assumption)


def _read(
    source: Source, files: Sequence[FoundFile], size: int
) -> tuple[list[FoundFile], list["_Part"]]:
    """The files that were opened, and what they gave. Many may be without text, as __init__.py
    often is."""
    filled = [place for place, file in enumerate(files) if file.size]
    first = evenly(len(filled), FILES)
    others = [number for number in evenly(len(filled), TRIES) if number not in first]
    opened: list[FoundFile] = []
    found: list[list[_Part]] = []
    for number in first + others:
        place = filled[number]
        opened.append(files[place])
        found.append(_parts(source, source.files[place], size // len(first)))
        if sum(map(bool, found)) == FILES:
            break
    return opened, [part for parts in found for part in parts]


def evenly(count: int, most: int) -> list[int]:
    """Up to `most` of range(count), the first among them, at equal distances."""
    chosen = min(count, most)
    return [place * count // chosen for place in range(chosen)]


@dataclass(frozen=True)
class _Part:
    """`share` of a document's text, whose row has `stored` bytes in its file."""

    text: str
    share: float
    stored: int


def _parts(source: Source, file: RowFile, size: int) -> list[_Part]:
    """Texts of the first rows, about `size` bytes in all. A long one is represented by two parts,
    its beginning and what follows its middle."""
    found: list[_Part] = []
    read, most_stored = 0, size * MOST_STORED
    for raw, *_ in islice(file.rows(), MOST_ROWS):
        if read > most_stored:
            break
        read += len(raw) if isinstance(raw, bytes) else 0
        try:
            text = row_text(file, raw, source.config.text_field)
        except BadRowError:  # the feed counts and reports it
            continue
        if not text:
            continue
        length = len(text.encode())
        stored = len(raw) if isinstance(raw, bytes) else length
        half = max(1, size * len(text) // length // 2)
        middle = len(text) // 2
        texts = [text] if length <= size else [text[:half], text[middle : middle + half]]
        found += [_Part(part, len(part.encode()) / length, stored) for part in texts]
        size -= length
        if size <= 0:
            break
    return found


def _form(source: Source, path: Path) -> str | None:
    return file_format(path) if source.config.format == "auto" else source.config.format


def _row_count(file: FoundFile) -> int:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        with open_unchanged(file.path, file.size) as opened:
            rows: int = read_metadata(opened).num_rows
    except (OSError, ArrowException):  # the feed reports it
        return 0
    return rows
