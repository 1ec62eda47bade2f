"""The feed of one data-parallel rank: batch t as a pure function of (config, seed, t).

Samples are numbered through the run; sample g comes from stream g % streams and goes to the data
rank that hosts it. A rank hosts the streams s with s % D == rank, and nothing about a stream
depends on D: so the state of all streams, merged, can be dealt out to any number of ranks.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from megapipe.config import DataConfig
from megapipe.data.batch import Batch, BatchWorker, FileReading
from megapipe.data.document_stream import DocumentStream
from megapipe.data.exclusions import Exclusions, History, keep, kept, read_exclusions
from megapipe.data.order.record import News, check_identity, identity, read_record, write_record
from megapipe.data.order.rows import RowStore
from megapipe.data.order.source_order import SourceOrder, window
from megapipe.data.order.timeline import phase_at, phases_of
from megapipe.data.packing import Packed, Packer, Tokens
from megapipe.data.rows import Account, BadRows
from megapipe.data.source_stream import SourceStream
from megapipe.data.sources import (
    Keeps,
    Source,
    changes_of,
    check_source,
    open_source,
    repeated_files,
)
from megapipe.data.taken import State, Taken
from megapipe.data.tokenizer import Tokenizer
from megapipe.data.validation_split import rows_of_side
from megapipe.errors import DataError


class BatchFeed:
    """Iterates over the batches of one replica, made ahead of time by a thread.

    `state_dict` speaks of batches that were taken, however many were made. Errors of the thread
    are raised by the `next` that would have returned the batch. With `validation` it reads the
    validation text instead: data.validation_sources, or the rows that data.validation_fraction
    sets aside, always those of the files that the run began with. `opened` are sources of the same
    config that another feed has opened; those that this feed reads too are not opened again.
    `record` is the directory in which the run keeps what was found of its files; only the first
    replica writes there. With `reads_back` it reads again what the run of that record has read:
    nothing is written, and the origins of tokens have the ids of their rows. Raises DataError for
    text that can't be read.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        tokenizer: Tokenizer,
        replica: int,
        replicas: int,
        global_batch_size: int,
        sequence_length: int,
        validation: bool = False,
        opened: Sequence[Source] = (),
        record: Path | None = None,
        reads_back: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.streams = config.streams or global_batch_size
        assert self.streams % replicas == 0, (self.streams, replicas)
        assert global_batch_size % replicas == 0, (global_batch_size, replicas)
        self.wait_seconds = 0.0
        self._config = config
        self._seed = seed
        self._tokenizer = tokenizer
        self._replica, self._replicas = replica, replicas
        self._hosted = range(replica, self.streams, replicas)
        self._global_batch_size = global_batch_size
        self._sequence_length = sequence_length
        self._validation = validation
        self._record = record
        self._reads_back = reads_back
        self._say = say or logging.getLogger("megapipe.data").warning
        own = validation and bool(config.validation_sources)
        self._split = config.validation_fraction if not config.validation_sources else 0.0
        if validation and not own and not self._split:
            raise DataError(
                "there is no validation text: set data.validation_sources, or "
                "data.validation_fraction above 0, or train.validation_every = 0."
            )
        self._source_configs = config.validation_sources if own else config.sources
        self._numbers = {one.name: number for number, one in enumerate(self._source_configs)}
        self._records = {one.name: read_record(record, one) for one in self._source_configs}
        self._sources = self._open_sources({source.name: source for source in opened})
        phases = config.model_copy(update={"sources": self._source_configs, "phases": ()})
        self._phases = phases_of(
            phases if validation else config, global_batch_size * sequence_length
        )
        if replica == 0:
            for note in repeated_files(self._sources):
                self._say(note)
        for source in self._sources:
            check_source(source, self._keeps(source), max_bad_rows=config.max_bad_rows)
        excluded = None if validation else read_exclusions(config.exclude)
        self._excluded = excluded
        self._exclusions = History.of(excluded)
        self._worker: BatchWorker | None = None
        self._step = self._sample = 0
        self._closed = False
        self._before: tuple[int, dict[int, State]] | None = None
        self._store = RowStore(0)
        self.orders = [self._order(source) for source in self._sources]
        """Of the sources: which row comes when."""
        self._build_streams()

    def __iter__(self) -> "BatchFeed":
        return self

    def __next__(self) -> Batch:
        assert not self._closed, "a closed feed has to load a state first"
        if self._worker is None:
            self._keep_record()
            self._worker = BatchWorker(self._batches(), self._config.prefetch)
        started = time.perf_counter()
        batch = self._worker.take()
        self.wait_seconds = time.perf_counter() - started
        assert batch.step == self._step
        self._before = self._sample, self._taken.states
        self._step += 1
        self._sample += self._global_batch_size
        self._taken.advance(batch.after)
        return batch

    def take_back(self) -> None:
        """Make the state the one before the last batch was taken. No batch can be taken then."""
        assert self._before is not None, "a batch has to be taken first, and only one goes back"
        self._step -= 1
        self._sample, states = self._before
        self._taken, self._before = Taken(states), None
        self._closed = True

    def state_dict(self) -> State:
        """The position behind the last batch taken, for the hosted streams. JSON."""
        return {
            "step": self._step,
            "sample": self._sample,
            "identity": self._identity(),
            "streams": {str(stream): state for stream, state in sorted(self._taken.states.items())},
        }

    def load_state_dict(self, state: State) -> None:
        """Goes on behind the state of all streams (see merge_states), saved at any data size.

        Raises DataError when the data is not that of the checkpoint.
        """
        self.check(state)
        step, saved = state["step"], state["identity"]["excluded"]
        self._exclusions = History.going_on(saved, self._excluded, step, self._kept_exclusions)
        self._go_on(state)

    def check(self, state: State) -> None:
        """Raises DataError when the data is not that of a state."""
        check_identity(state["identity"], self._identity(), state["step"], self.news)

    @property
    def news(self) -> dict[str, News]:
        """How the files of each source differ from those on record."""
        return {source.name: News(source, self._records[source.name]) for source in self._sources}

    def history(self, state: State) -> History:
        """Which rows were excluded when, up to a state and at the start that went on from it."""
        return History.recorded(state["identity"]["excluded"], self._kept_exclusions)

    def replay(
        self, state: State, exclusions: History, global_batch_size: int, stream: int | None = None
    ) -> None:
        """Goes on behind a state that `check` has passed, as a run did that had these exclusions
        and steps of so many samples; if there is a `stream`, with its samples alone."""
        self._hosted = range(self.streams) if stream is None else range(stream, stream + 1)
        self._exclusions = exclusions
        self._global_batch_size = global_batch_size
        self._go_on(state)

    def _go_on(self, state: State) -> None:
        step = state["step"]
        self.close()
        self._build_streams()
        self._closed = False
        self._step, self._sample = step, state["sample"]
        self._before = None
        self._taken = Taken({stream: state["streams"][str(stream)] for stream in self._hosted})
        weights = phase_at(self._phases, max(0, step - 1)).weights
        for stream, part in self._taken.states.items():
            documents, packer = self._streams[stream]
            documents.load(part, step, weights, self._exclusions.at(step - 1))
            packer.last = part["last"]
        self._bad_rows.restore(self.account.skipped)

    @property
    def account(self) -> Account:
        """What the hosted streams met and did not train on, up to the last batch taken."""
        return self._taken.account

    @property
    def epoch(self) -> int:
        """The furthest pass that a hosted stream has begun, counted from 0."""
        return self._taken.epoch

    @property
    def epochs(self) -> Mapping[str, float]:
        """Passes over each source, parts of passes included, summed over the hosted streams."""
        return self._taken.epochs

    @property
    def sources(self) -> list[Source]:
        """The sources that are read, in the order of the config."""
        return self._sources

    @property
    def excluded(self) -> Exclusions | None:
        """What the config excludes now."""
        return self._excluded

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def close(self) -> None:
        """Ends the thread and closes the files. Only load_state_dict opens the feed again."""
        self._closed = True
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._store.close()

    def _open_sources(self, opened: Mapping[str, Source]) -> list[Source]:
        section = (
            "sources" if self._source_configs is self._config.sources else "validation_sources"
        )
        return [
            opened.get(source.name)
            or open_source(
                source,
                f"data.{section}[{index}]",
                self.streams,
                changes=changes_of(self._config.changes, source.name),
                record=self._records[source.name],
            )
            for index, source in enumerate(self._source_configs)
        ]

    def _keeps(self, source: Source) -> Keeps:
        """Which rows of a source are read: those of one side of the split."""
        return rows_of_side(self._split, self._seed, source.name, validation=self._validation)

    def _build_streams(self) -> None:
        """Every hosted stream at its start, over rows that they share."""
        config = self._config
        self._bad_rows = BadRows(config.max_bad_rows, self._say)
        open_parts = sum(
            window(source, self.streams, config.open_parts) * len(self._hosted)
            for source in self._sources
        )
        self._store.parts = open_parts
        self._streams: dict[int, tuple[DocumentStream, Packer]] = {}
        for stream in self._hosted:
            parts = {order.source.name: self._source_stream(order, stream) for order in self.orders}
            documents = DocumentStream(parts, stream)
            documents.begin(0, self._phases[0].weights, self._exclusions.at(0))
            self._streams[stream] = documents, Packer(documents, self._sequence_length)
        self._taken = Taken({stream: self._state(stream) for stream in self._hosted})

    def _order(self, source: Source) -> SourceOrder:
        return SourceOrder(
            source,
            seed=self._seed,
            streams=self.streams,
            open_parts=self._config.open_parts,
            max_epochs=None if self._validation else source.config.max_epochs,
            store=self._store,
        )

    def _source_stream(self, order: SourceOrder, stream: int) -> SourceStream:
        return SourceStream(
            order,
            stream,
            tokenizer=self._tokenizer,
            keeps=self._keeps(order.source),
            bad_rows=self._bad_rows,
            with_ids=self._reads_back,
        )

    def _state(self, stream: int) -> State:
        documents, packer = self._streams[stream]
        return documents.state() | {"last": packer.last}

    def _batches(self) -> Iterable[Batch]:
        """All batches from the position on."""
        sample = self._sample
        changes = self._change_steps()
        step = self._step
        while True:
            if step in changes:
                self._begin(step)
            yield self._make(step, sample)
            step += 1
            sample += self._global_batch_size

    def _change_steps(self) -> set[int]:
        """Steps behind which weights or files change."""
        if self._validation:
            return set()
        joins = {cohort.after_step for source in self._sources for cohort in source.cohorts}
        leaves = {step for source in self._sources for step in source.leaves.values()}
        phases = {phase.after_step for phase in self._phases}
        return joins | leaves | phases | self._exclusions.steps

    def _begin(self, step: int) -> None:
        """What the config declares for the batch behind step `step`."""
        phase = phase_at(self._phases, step)
        weights = phase.weights if phase.after_step == step else None
        for documents, _ in self._streams.values():
            documents.begin(step, weights, self._exclusions.at(step))

    def _make(self, step: int, first: int) -> Batch:
        numbers = [
            sample
            for sample in range(first, first + self._global_batch_size)
            if sample % self.streams in self._hosted
        ]
        streams = [sample % self.streams for sample in numbers]
        sequences = [self._streams[stream][1].next() for stream in streams]
        length = self._sequence_length
        return Batch(
            step,
            numbers,
            _stacked([sequence.tokens for sequence in sequences], length + 1),
            _stacked([sequence.documents for sequence in sequences], length),
            _stacked([self._sources_of(sequence) for sequence in sequences], length),
            [sequence.stretches for sequence in sequences],
            {stream: self._state(stream) for stream in streams},
            self._slowest(),
        )

    def _slowest(self) -> FileReading:
        """The file on which most time was spent since the batch before."""
        spent = [(*order.take_seconds(), order.source.name) for order in self.orders]
        seconds, key, name = max(spent)
        return FileReading(seconds, name, key)

    def _sources_of(self, sequence: Packed) -> Tokens:
        """The number of each target's source."""
        found = np.zeros(self._sequence_length, dtype=np.int32)
        for stretch in sequence.stretches:
            first = max(0, stretch.start - 1)  # target i is token i + 1
            found[first : stretch.start + stretch.length - 1] = self._numbers[stretch.origin.source]
        return found

    def _keep_record(self) -> None:
        if self._record is None or self._replica or self._validation or self._reads_back:
            return
        for source in self._sources:
            if source.found is not None:
                write_record(self._record, source)
        if self._excluded is not None:
            keep(self._record, self._excluded)

    def _kept_exclusions(self, digest: str) -> Exclusions:
        if self._record is None:
            raise DataError(f"the rows that were excluded (list {digest}) are not known any more.")
        return kept(self._record, digest)

    def _identity(self) -> State:
        """What the order of the data depends on."""
        config = self._config
        return identity(
            self._sources,
            self._phases,
            self._exclusions.state(),
            {
                "train.seed": self._seed,
                "data.streams": self.streams,
                "data.open_parts": config.open_parts,
                "data.validation_fraction": config.validation_fraction,
                "data.tokenizer": tokenizer_identity(self._tokenizer),
            },
        )


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """What states say of a tokenizer."""
    return f"{tokenizer.vocab_size:,} tokens ({tokenizer.sha256})"


def merge_states(states: Sequence[State]) -> State:
    """The states of all data ranks after the same step as one that any layout can load."""
    first = states[0]
    assert all(state["step"] == first["step"] for state in states)
    assert all(state["identity"] == first["identity"] for state in states)
    streams = {stream: part for state in states for stream, part in state["streams"].items()}
    assert len(streams) == first["identity"]["settings"]["data.streams"], sorted(streams)
    return first | {"streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}


def _stacked(rows: Sequence[Tokens], width: int) -> Tokens:
    """The rows [n, width]; n may be 0."""
    return np.array(rows, dtype=np.int32).reshape(len(rows), width)
