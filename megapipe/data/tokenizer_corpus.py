"""The text that a tokenizer is trained on: which files, and how much of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megapipe.amounts import counted
from megapipe.config import SourceConfig
from megapipe.config.paths import escape_path
from megapipe.data.files import COMPRESSED, Found, files_below, find_files
from megapipe.data.rows import Account, BadRowError, BadRows
from megapipe.data.sentencepiece_tokenizer import META_SPACE
from megapipe.data.sources import Source, open_found
from megapipe.data.units import Unit
from megapipe.errors import DataError
from megapipe.files import shown

SENTENCE_CHARACTERS = 4000
SENTENCE_BYTES = 4 * SENTENCE_CHARACTERS  # sentencepiece leaves out what is longer than its limit
CHECKED_BYTES = 2 << 20
WHOLE_FILE = Unit(0, 0, 0)


@dataclass
class Sampler:
    """Takes `share` of what passes, evenly and without chance."""

    share: float
    seen: int = 0
    taken: int = 0

    def takes(self, size: int) -> bool:
        self.seen += size
        if self.taken + size > self.share * self.seen:
            return False
        self.taken += size
        return True


@dataclass
class Corpus:
    """Texts of all sources in order; counts what passes and keeps some to check the result on."""

    sources: list[Source]
    say: Callable[[str], None]
    texts: int = 0
    sample: list[str] = field(default_factory=list)
    account: Account = field(default_factory=Account)
    meta_spaces: int = 0
    failure: BaseException | None = None
    """What ended the reading of the files. sentencepiece only passes on its name."""

    @property
    def stored_bytes(self) -> int:
        """Size of the files."""
        return sum(source.found.size for source in self.sources if source.found)

    @property
    def total_bytes(self) -> int:
        """Of text; estimated where files are compressed."""
        return sum(source.total_bytes or 0 for source in self.sources)

    def sentences(self, sample_bytes: int) -> Iterator[str]:
        """Lines, the long ones cut, of about `sample_bytes` in all."""
        lines = Sampler(min(1.0, sample_bytes / self.total_bytes))
        checked = Sampler(min(1.0, CHECKED_BYTES / self.total_bytes))
        for text in self._usable_texts():
            self.texts += 1
            self.meta_spaces += text.count(META_SPACE)
            if checked.takes(len(text)) or not self.sample:
                self.sample.append(text[: CHECKED_BYTES // 4])
            for line in text.split("\n"):
                for start in range(0, len(line), SENTENCE_CHARACTERS):
                    part = line[start : start + SENTENCE_CHARACTERS]
                    if lines.takes(len(part)):
                        yield part

    def _usable_texts(self) -> Iterator[str]:
        try:
            yield from self._texts()
        except GeneratorExit:
            raise
        except BaseException as error:
            self.failure = error
            raise

    def _texts(self) -> Iterator[str]:
        bad_rows = BadRows(limit=None, say=self.say)
        for source in self.sources:
            for file in source.files:
                for raw, address, _ in file.rows():
                    try:
                        text = source.text(file, raw)
                    except BadRowError as error:
                        self.account.add_bad(raw, error.reason)
                        bad_rows.add(source.key, file.name, file.place(WHOLE_FILE, address), error)
                        continue
                    if text:
                        yield text

    def left_out(self) -> str:
        """How many rows were skipped and why, and the bytes lost with them; "" if none."""
        account = self.account
        if not account.skipped:
            return ""
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in account.skipped.most_common())
        line = f"{counted(account.skipped.total(), 'bad row')} ({reasons})"
        if account.skipped_bytes:
            line += f", {counted(account.skipped_bytes, 'byte')} of text"
        if account.unreadable_bytes:
            line += f"; {counted(account.unreadable_bytes, 'byte')} of files can't be read"
        return line


def open_all(places: Sequence[Path], text_field: str) -> list[Source]:
    """One source for each of FILES, which are paths, globs and directories."""
    sources = []
    for place in places:
        found = _files_under(place) if place.is_dir() else find_files(str(place), "FILES")
        config = SourceConfig(
            name="FILES", path=escape_path(shown(str(place))), text_field=text_field
        )
        sources.append(open_found([found], config, "FILES", streams=1))
    return sources


def _files_under(directory: Path) -> Found:
    """Text files of a directory and all below it; what does not look like text is left out."""
    found = files_below(directory, "FILES")
    if not found.files:
        raise DataError(
            f"FILES: there is no text in the directory {shown(directory)} (txt, md, py, jsonl, "
            f"parquet, arrow; also {', '.join(COMPRESSED)}); name its files by a glob."
        )
    return found
