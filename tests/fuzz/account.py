"""The account of a source over one pass: every byte is delivered, dropped by a rule, or reported.

Bytes of the files, decompressed by `oracle`, are those of rows; and each row is delivered (which
the ids show, decoded here), blank, or one of the bad rows that the feed counts. What a damaged
file has behind its last whole row is lost, and the feed has to name that file.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from tests.fuzz.oracle import File, Row


@dataclass(frozen=True)
class Balance:
    """Bytes of a source by what became of them."""

    total: int
    delivered: int
    blank: int
    bad: int
    lost: int

    @property
    def unexplained(self) -> int:
        return self.total - self.delivered - self.blank - self.bad - self.lost


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
    files: Sequence[File], delivered: Sequence[str], skipped: int, said: Sequence[str], form: str
) -> tuple[Balance, list[str]]:
    """One pass over the files: the account, and what is wrong with it.

    `delivered` are the documents of exactly one pass, `skipped` the bad rows that were counted.
    `form` is data.sources.documents; a whole file may come in several documents.
    """
    problems: list[str] = []
    have = Counter(delivered)
    sums: Counter[str] = Counter()
    fewest = most = 0
    for file in files:
        reported = file.whole or any(file.path.name in text for text in said)
        for number, row in enumerate(file.rows, 1):
            size, last = len(row.raw), number == len(file.rows)
            rest = not file.whole and last
            fewest += row.verdict == "bad" and not rest
            most += row.verdict != "good" or rest
            if row.verdict != "good":
                sums[row.verdict] += size
            elif _take(row, have, split=form == "file" and not _is_rows(file)):
                sums["delivered"] += size
            elif rest and reported:
                sums["lost"] += size
            else:
                problems.append(f"{file.path.name!r}, row {number} is lost: {row.text[:60]!r}")
        most += not file.whole
        if not reported:
            problems.append(f"{file.path.name!r} is damaged, and nothing says so")
    over = [text for text, count in have.items() for _ in range(count)]
    problems += [f"delivered, and in no file, or once too often: {text[:60]!r}" for text in over]
    if not fewest <= skipped <= most:
        problems.append(f"{skipped} bad rows were counted, and there are {fewest} to {most}")
    total = sum(file.size for file in files)
    names = ("delivered", "blank", "bad", "lost")
    found = Balance(total, *(sums[name] for name in names))
    if found.unexplained and not problems:
        problems.append(f"{found.unexplained} of {total} bytes are neither delivered nor reported")
    return found, problems[:5]


def _is_rows(file: File) -> bool:
    return file.table or bool({".jsonl", ".ndjson", ".json"} & set(file.path.suffixes))


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
    have.subtract(taken)
    return True
