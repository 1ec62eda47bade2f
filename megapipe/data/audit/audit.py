"""Reads everything that a run's data holds, and says what it found."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megapipe.config import Config
from megapipe.data.audit.budget import FileTokens, RunUse, Supply, plan_budget
from megapipe.data.audit.duplicates import Duplicates, HashWriter, find_duplicates
from megapipe.data.audit.tally import RowCounter, Side, Tally
from megapipe.data.audit.workers import Advance, worker_processes
from megapipe.data.exclusions import Exclusions, read_exclusions
from megapipe.data.order.keys import keyed
from megapipe.data.order.parts import FileOrder
from megapipe.data.order.record import read_record, write_record
from megapipe.data.order.timeline import phases_of
from megapipe.data.sources import Source, SourceFile, changes_of, open_source
from megapipe.data.tokenizer import Tokenizer
from megapipe.data.validation_split import rows_of_side
from megapipe.errors import DataError

TASK_BYTES = 16 << 20
"""Of text, roughly, that a worker reads at a time; an archive without frames is read by one."""

TRAINING, VALIDATION = 0, 1

Bar = Callable[[str, int], AbstractContextManager[Advance]]
"""A progress bar: what is done, and bytes in all -> what is called with each number of bytes."""


@dataclass
class Audited:
    """One source and what was found in it.

    Its tally has two sides, training and validation, where rows are set aside, else one of them;
    `duplicates` are by side. `file_tokens` are those of the first side, by the key of the file.
    `refused` has a line for each file that can't be read at all; `own_order` names files whose
    rows can't be shuffled.
    """

    source: Source
    trained: bool
    tally: Tally
    refused: list[str]
    duplicates: list[Duplicates]
    units: int
    parts: int
    own_order: list[str]
    file_tokens: dict[str, int]

    @property
    def training(self) -> Side:
        """What training sees; of a validation source, what validation sees."""
        return self.tally.sides[0]

    @property
    def set_aside(self) -> Side | None:
        """Rows of a training source that validation reads."""
        return self.tally.sides[1] if len(self.tally.sides) > 1 else None


@dataclass
class Audit:
    """All sources, those of validation behind the others, and what the run makes of them."""

    config: Config
    tokenizer: Tokenizer
    exclusions: Exclusions | None
    sources: list[Audited]
    run_use: RunUse


class Task(NamedTuple):
    """Units [first, last) of a file, all by number."""

    source: int
    file: int
    first: int
    last: int


@dataclass
class _Opened:
    """A source and how it is counted; `files` are those of all cohorts that can be read."""

    counter: RowCounter
    trained: bool
    refused: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[SourceFile]:
        cohorts = self.counter.source.cohorts
        return [file for cohort in cohorts for file in cohort.files if file.rows is not None]


def audit(
    config: Config,
    tokenizer: Tokenizer,
    *,
    scratch: Path,
    workers: int,
    bar: Bar,
    record: Path | None = None,
) -> Audit:
    """Reads all sources of the config in `workers` processes; hashes of texts go into `scratch`.

    `record` is where the run keeps what was found of its files. Raises DataError for a source that
    can't be looked for, and where the disk fails.
    """
    exclusions = read_exclusions(config.data.exclude)
    opened = list(_open_all(config, tokenizer, exclusions, record))
    tallies = [Tally([Side() for _ in one.counter.keeps]) for one in opened]
    tokens: list[dict[str, int]] = [{} for _ in opened]
    files = [one.files for one in opened]
    work = partial(_count, [one.counter for one in opened], files, scratch)
    total = sum(unit.size for some in files for file in some for unit in file.units)
    with worker_processes(work, workers) as results, bar("Audit", total) as advance:
        for task, tally in results(_tasks(files), advance):
            tallies[task.source].update(tally)
            key = files[task.source][task.file].key
            more = tally.sides[TRAINING].tokens
            tokens[task.source][key] = tokens[task.source].get(key, 0) + more
    found = find_duplicates(scratch, [True, False] * len(opened))
    sources = [
        _audited(config, one, tally, [found[tag] for tag in one.counter.tags], of_files)
        for number, (one, tally, of_files) in enumerate(zip(opened, tallies, tokens, strict=True))
    ]
    return Audit(config, tokenizer, exclusions, sources, _run_use(config, sources))


def keep_records(audited: Audit, directory: Path) -> None:
    """Write what the first start would otherwise have to find: where each file can be read from."""
    for one in audited.sources:
        if one.trained and one.source.found is not None and not one.refused:
            write_record(directory, one.source)


def _open_all(
    config: Config, tokenizer: Tokenizer, exclusions: Exclusions | None, record: Path | None
) -> Iterator[_Opened]:
    """Training sources, then those of validation."""
    data, seed = config.data, config.train.seed
    fraction = 0.0 if data.validation_sources else data.validation_fraction
    sections = (("sources", data.sources), ("validation_sources", data.validation_sources))
    number = 0
    for section, sources in sections:
        trained = section == "sources"
        sides = (TRAINING, VALIDATION) if trained and fraction else (TRAINING,)
        for index, one in enumerate(sources):
            refused: list[DataError] = []
            source = open_source(
                one,
                f"data.{section}[{index}]",
                config.streams,
                changes=changes_of(data.changes, one.name) if trained else (),
                record=read_record(record, one),
                refuse=refused.append,
            )
            counter = RowCounter(
                source,
                tokenizer,
                [
                    rows_of_side(
                        fraction if trained else 0.0, seed, one.name, validation=bool(side)
                    )
                    for side in sides
                ],
                [exclusions if trained and side == TRAINING else None for side in sides],
                [2 * number + (side if trained else VALIDATION) for side in sides],
            )
            yield _Opened(counter, trained, sorted(map(str, refused)))
            number += 1


def _tasks(files: Sequence[Sequence[SourceFile]]) -> Iterator[Task]:
    """Runs of units of about TASK_BYTES."""
    for source, some in enumerate(files):
        for number, file in enumerate(some):
            first = size = 0
            for unit, (*_, more, _) in enumerate(file.units):
                size += more
                if size >= TASK_BYTES:
                    yield Task(source, number, first, unit + 1)
                    first, size = unit + 1, 0
            if first < len(file.units):
                yield Task(source, number, first, len(file.units))


def _count(
    counters: Sequence[RowCounter],
    files: Sequence[Sequence[SourceFile]],
    scratch: Path,
    task: Task,
    advance: Advance,
) -> tuple[Task, Tally]:
    """Counts the units of a task. Each process writes hashes into files of its own."""
    hashes = HashWriter(scratch, str(os.getpid()))
    units = range(task.first, task.last)
    file = files[task.source][task.file]
    tally = counters[task.source].count(file, task.file, units, hashes, advance)
    hashes.flush()
    return task, tally


def _audited(
    config: Config,
    opened: _Opened,
    tally: Tally,
    duplicates: list[Duplicates],
    tokens: Mapping[str, int],
) -> Audited:
    source = opened.counter.source
    key = keyed("source", config.train.seed, source.name)
    orders = [
        FileOrder(cohort.files, key=key, number=number, streams=config.streams)
        for number, cohort in enumerate(source.cohorts)
    ]
    return Audited(
        source,
        opened.trained,
        tally,
        opened.refused,
        duplicates,
        units=sum(len(file.units) for file in opened.files),
        parts=sum(order.places for order in orders),
        own_order=[file.key for file in opened.files if file.units.whole],
        file_tokens=dict(tokens),
    )


def _run_use(config: Config, sources: Sequence[Audited]) -> RunUse:
    train = config.train
    per_step = train.global_batch_size * train.sequence_length
    supplies = {one.source.name: _supply(one) for one in sources if one.trained}
    return plan_budget(supplies, phases_of(config.data, per_step), train.steps, per_step)


def _supply(one: Audited) -> Supply:
    source = one.source
    tokens: Counter[tuple[int, int | None]] = Counter()
    for cohort in source.cohorts:
        for file in cohort.files:
            leaves = source.leaves.get(file.key)
            tokens[cohort.after_step, leaves] += one.file_tokens.get(file.key, 0)
    files = [FileTokens(count, *when) for when, count in tokens.items()]
    return Supply(files, source.config.max_epochs, source.config.after_max_epochs)
