"""The account of a source over one pass: every byte is delivered, or reported as not delivered.

The decompressed bytes of the files, as `oracle` finds them, are those of rows. Each row is good,
and then the ids show that it was delivered (they are decoded here); or it is blank or empty, which
is no row by the rules of docs/data.md; or it is bad, and then the feed has counted it with its
bytes. A damaged file has to be named, and counts as one bad row besides.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from tests.fuzz.oracle import File, Row


class Decoder:
    """From ids to documents, with a sentencepiece processor of its own."""

    def __init__(self, model: Path) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self._end = self._processor.eos_id()

    def documents(self, ids: Sequence[int]) -> list[str]:
        """The texts between end-of-document ids; one that is not finished is left out."""
        documents, start = [], 0
        for at, number in enumerate(ids):
            if number == self._end:
                documents.append(self._processor.decode(list(ids[start:at])))
                start = at + 1
        return documents

    def count(self, texts: Iterable[str]) -> int:
        """Tokens of texts, with an end token each."""
        return sum(len(self._processor.encode(text)) + 1 for text in texts)


def balance(
    files: Sequence[File], delivered: Sequence[str], answer: Mapping[str, Any]
) -> list[str]:
    """What is wrong with one pass over the files; at most five lines.

    `delivered` are the documents of exactly one pass, `answer` what the feed has reported (see
    `feed_ids`). Long texts may come in several documents.
    """
    problems: list[str] = []
    have = Counter(delivered)
    sizes: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for file in files:
        if not file.whole and not any(file.path.name in text for text in answer["said"]):
            problems.append(f"{file.path.name!r} is damaged, and nothing says so")
        rows["bad"] += not file.whole
        rows["empty"] += not file.size and file.whole
        sizes["bad"] += file.cut
        for number, row in enumerate(file.rows, 1):
            rows[row.verdict] += 1
            sizes[row.verdict] += len(row.raw)
            if row.verdict == "good" and not _take(row, have, split=_is_text(file)):
                problems.append(f"{file.path.name!r}, row {number} is lost: {row.text[:60]!r}")
    over = [text for text, count in have.items() for _ in range(count)]
    problems += [f"delivered, and in no file, or once too often: {text[:60]!r}" for text in over]
    counts = ("skipped_rows", "empty_rows", "skipped_bytes")
    for name, there in zip(counts, (rows["bad"], rows["empty"], sizes["bad"]), strict=True):
        if answer[name] != there:
            problems.append(f"{name}: {answer[name]} were reported, and there are {there}")
    total = sum(file.size for file in files)
    assert total == sizes.total(), "each byte of a file is in one of its rows"
    return problems[:5]


def _is_text(file: File) -> bool:
    rows = {".jsonl", ".ndjson", ".json", ".parquet", ".arrow"}
    return not rows & set(file.path.suffixes)


def _take(row: Row, have: Counter[str], *, split: bool) -> bool:
    """Take a row's text out of what was delivered, whole or (a large file) in pieces."""
    for text in (row.text, row.text.rstrip("\r\n")):
        if have[text] > 0:
            have[text] -= 1
            return True
    return split and _take_pieces(row.text, have)


def _take_pieces(text: str, have: Counter[str]) -> bool:
    """Pieces follow each other without a gap. Lines are unique, so that the longest one that
    fits is the one."""
    taken: list[str] = []
    pieces = sorted((piece for piece, count in have.items() if count and piece), key=len)[::-1]
    at = 0
    while at < len(text):
        found = next((piece for piece in pieces if text.startswith(piece, at)), None)
        if found is None:
            return False
        taken.append(found)
        at += len(found)
        while at < len(text) and text[at] in "\r\n" and not found.endswith("\n"):
            at += 1
    have.subtract(taken)
    return True
