"""Audits of small corpora."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from megapipe.config import Config, DataConfig
from megapipe.config.load import load_config
from megapipe.data.audit.audit import Audit, audit
from megapipe.data.audit.workers import Advance
from megapipe.data.tokenizer import Tokenizer
from megapipe.models.families import FAMILIES
from tests.config.examples import write
from tests.data.samples import ByteTokenizer


class Bytes:
    """A progress bar that adds up."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def __call__(self, what: str, total: int) -> AbstractContextManager[Advance]:
        self.total = total
        return nullcontext(self._advance)

    def _advance(self, count: int) -> None:
        self.done += count


def config_of(folder: Path, data: DataConfig, **train: Any) -> Config:
    """A config of a run in `folder` that reads `data` with seed 1."""
    config = load_config(write(folder), [], FAMILIES)
    settings = {"seed": 1, "run_dir": str(folder / "run"), **train}
    return config.model_copy(
        update={"data": data, "train": config.train.model_copy(update=settings)}
    )


def audited(
    folder: Path,
    data: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    workers: int = 1,
    bar: Bytes | None = None,
    **train: Any,
) -> Audit:
    """The audit of `data`, counted in bytes unless there is a `tokenizer`."""
    scratch = folder / "scratch"
    scratch.mkdir()
    config = config_of(folder, data, **train)
    tokenizer = tokenizer or ByteTokenizer()
    return audit(config, tokenizer, scratch=scratch, workers=workers, bar=bar or Bytes())
