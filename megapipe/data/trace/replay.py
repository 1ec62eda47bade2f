"""Reads steps of a run again: the same batches, on one process, whatever its layout was."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megapipe.config import Config, DataConfig, Families, parse_config
from megapipe.data.feed import Batch, BatchFeed, State, tokenizer_identity
from megapipe.data.order.record import RECORD
from megapipe.data.positions import positions_in, read_position
from megapipe.data.tokenizer import Tokenizer, load_tokenizer
from megapipe.errors import DataError
from megapipe.files import reason, shown

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows work while it goes on: what it is, and how much; gives what is called with what is done."""

CONFIG = "resolved-config.toml"
NO_LIMIT = 1 << 60
READ_AT_ONCE = 4
"""Positions that are kept in memory."""


def reading_back(
    config: Config,
    data: DataConfig,
    tokenizer: Tokenizer,
    record: Path,
    say: Callable[[str], None] | None = None,
) -> BatchFeed:
    """A feed of whole global batches of a config, with `data` in place of its own, that writes
    nothing to the run's record."""
    return BatchFeed(
        data,
        seed=config.train.seed,
        tokenizer=tokenizer,
        replica=0,
        replicas=1,
        global_batch_size=config.train.global_batch_size,
        sequence_length=config.train.sequence_length,
        record=record,
        reads_back=True,
        say=say,
    )


@dataclass(frozen=True)
class ReplayedStep:
    """A step of the run, numbered as in metrics.jsonl, and what it read. Its first sample is number
    `first` of the run, also where only one stream is read."""

    number: int
    first: int
    batch: Batch


class Replay:
    """What a run has read.

    `config` is the one of its newest start; `run_dir` is where its files are now. Raises DataError
    where the run has no positions, or the data is not what it was.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config = config
        record = run_dir / RECORD
        self._positions = positions_in(record)
        if not self._positions:
            raise DataError(
                f"{shown(record)} has no position in the data, which a run writes there at its "
                "start and with each checkpoint. Name the directory of a run (its train.run_dir)."
            )
        self._read = lru_cache(READ_AT_ONCE)(read_position)
        newest = self.position(self.newest)
        # Rows are excluded as the position has it, whose lists are kept beside the run.
        data = config.data.model_copy(update={"exclude": (), "max_bad_rows": NO_LIMIT})
        tokenizer = _tokenizer(config, run_dir, newest)
        self.feed = reading_back(config, data, tokenizer, record, say=lambda line: None)
        self.feed.check(newest)
        self.exclusions = self.feed.history(newest)

    @property
    def steps(self) -> list[int]:
        """Behind which there is a position, in ascending order."""
        return list(self._positions)

    @property
    def newest(self) -> int:
        return self.steps[-1]

    def position(self, step: int) -> State:
        """The state of the feed behind a step of `steps`."""
        return self._read(self._positions[step])

    def kept_at(self, step: int) -> float:
        """When the position at a step or the next one behind it was written, in seconds since 1970;
        of a later step than all, now."""
        path = next((path for at, path in self._positions.items() if at >= step), None)
        return time.time() if path is None else path.stat().st_mtime

    def before(self, step: int) -> int:
        """The nearest step with a position from which `step` can be read.

        Raises DataError where there is none.
        """
        found = [at for at in self.steps if at < step]
        if not found:
            raise DataError(
                f"step {step} was not trained by this run, which begins behind step "
                f"{self.steps[0]}. Name a later one, or the directory of the run before."
            )
        return found[-1]

    def read(self, first: int, last: int, bar: Bar) -> Iterator[ReplayedStep]:
        """The steps up to `last`, from the position before `first` on."""
        begin = self.before(first)
        with bar(f"Reading on from step {begin}", last - begin) as advance:
            for step in self.read_on(begin):
                advance(1)
                yield step
                if step.number >= last:
                    return

    def read_on(self, begin: int, stream: int | None = None) -> Generator[ReplayedStep, None, None]:
        """All steps behind that of a position; if there is a `stream`, only its samples."""
        state = self.position(begin)
        size = self._batch_size(begin)
        self.feed.replay(state, self.exclusions, size, stream)
        try:
            for number, batch in enumerate(self.feed):
                yield ReplayedStep(begin + 1 + number, state["sample"] + number * size, batch)
        finally:
            self.feed.close()

    def _batch_size(self, begin: int) -> int:
        """Samples of a step behind a position: as many as up to the next one, since a start may
        have changed that."""
        later = [at for at in self.steps if at > begin]
        if not later:
            return self.config.train.global_batch_size
        one, other = self.position(begin), self.position(later[0])
        samples: int = other["sample"] - one["sample"]
        return samples // (later[0] - begin)


def run_config(run_dir: Path, families: Families) -> Config:
    """The config of a run's newest start. Raises DataError where there is none."""
    path = run_dir / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not text."
        raise DataError(
            f"{shown(path)}: can't be read: {why} Name the directory of a run (its train.run_dir)."
        ) from error
    return parse_config(text, families, str(path))


def _tokenizer(config: Config, run_dir: Path, state: State) -> Tokenizer:
    """The run's: what the config names, or the copy in a checkpoint."""
    wanted = state["identity"]["settings"]["data.tokenizer"]
    places = [Path(config.data.tokenizer)]
    places += sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)
    for place in places:
        try:
            found = load_tokenizer(place)
        except DataError:
            continue
        if tokenizer_identity(found) == wanted:
            return found
    raise DataError(
        f"the run's tokenizer, of {wanted}, is neither at data.tokenizer = "
        f'"{shown(config.data.tokenizer)}" nor in a checkpoint of {shown(run_dir)}. Put it back '
        "there."
    )
