"""The feed of one data-parallel rank: batch t as a pure function of (config, seed, t).

Sample i of batch t is global sample g = t * global_batch_size + i; it goes to data rank i % D and
comes from stream g % streams. A rank hosts the streams s with s % D == rank, and nothing about a
stream depends on D: so the state of all streams, merged, can be dealt out to any number of ranks.
"""

import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import xxhash

from megapipe.config import DataConfig
from megapipe.data.blend import Blend
from megapipe.data.blocks import BlockReader
from megapipe.data.packing import Packer, Tokens
from megapipe.data.rows import Account, BadRows
from megapipe.data.sources import Keeps, Source, check_source, open_source, repeated_files
from megapipe.data.streams import DocumentStream, SourceStream
from megapipe.data.taken import State, Taken
from megapipe.data.tokenizer import Tokenizer
from megapipe.errors import DataError


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch, n = global_batch_size / D samples in order.

    `tokens` int32 [n, S + 1], `documents` int32 [n, S]; `after` is the state of each stream that
    was read, behind this batch.
    """

    step: int
    tokens: Tokens
    documents: Tokens
    after: dict[int, State]


class BatchFeed:
    """Iterates over the batches of one replica, made ahead of time by a thread.

    `state_dict` speaks of batches that were taken, however many were made. Errors of the thread
    are raised by the `next` that would have returned the batch. With `validation` it reads the
    validation text instead: data.validation_sources, or the rows that data.validation_fraction
    sets aside. `opened` are sources of the same config that another feed has opened; those that
    this feed reads too are not opened again. Raises DataError for text that can't be read.
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
        say: Callable[[str], None] | None = None,
    ) -> None:
        assert config.streams % replicas == 0, (config.streams, replicas)
        assert global_batch_size % replicas == 0, (global_batch_size, replicas)
        self.wait_seconds = 0.0
        self._config = config
        self._seed = seed
        self._tokenizer = tokenizer
        self._hosted = range(replica, config.streams, replicas)
        self._samples = range(replica, global_batch_size, replicas)
        self._global_batch_size = global_batch_size
        self._sequence_length = sequence_length
        self._validation = validation
        self._say = say or logging.getLogger("megapipe.data").warning
        self._sources, self._keeps = self._open_sources({source.key: source for source in opened})
        if replica == 0:
            for note in repeated_files(self._sources):
                self._say(note)
        self._block_rows = [
            check_source(
                source,
                keeps,
                streams=config.streams,
                shuffle_block=config.shuffle_block,
                max_bad_rows=config.max_bad_rows,
            )
            for source, keeps in zip(self._sources, self._keeps, strict=True)
        ]
        self._worker: _Worker | None = None
        self._step = 0
        self._closed = False
        self._before: dict[int, State] | None = None
        self._build_streams()

    def __iter__(self) -> "BatchFeed":
        return self

    def __next__(self) -> Batch:
        assert not self._closed, "a closed feed has to load a state first"
        if self._worker is None:
            self._worker = _Worker(partial(self._make, self._step), self._config.prefetch)
        started = time.perf_counter()
        batch = self._worker.take()
        self.wait_seconds = time.perf_counter() - started
        assert batch.step == self._step
        self._step += 1
        self._before = self._taken.states
        self._taken.advance(batch.after)
        return batch

    def take_back(self) -> None:
        """Make the state the one before the last batch was taken. No batch can be taken then."""
        assert self._before is not None, "a batch has to be taken first, and only one goes back"
        self._step -= 1
        self._taken, self._before = Taken(self._before), None
        self._closed = True

    def state_dict(self) -> State:
        """The position behind the last batch taken, for the hosted streams. JSON."""
        return {
            "step": self._step,
            "identity": self._identity(),
            "streams": {str(stream): state for stream, state in sorted(self._taken.states.items())},
        }

    def load_state_dict(self, state: State) -> None:
        """Goes on behind the state of all streams (see merge_states), saved at any data size.

        Raises DataError when the data is not that of the checkpoint.
        """
        self._check_identity(state["identity"])
        self.close()
        self._build_streams()
        self._closed = False
        self._step = state["step"]
        self._before = None
        self._taken = Taken({stream: state["streams"][str(stream)] for stream in self._hosted})
        for stream, part in self._taken.states.items():
            documents, packer = self._streams[stream]
            documents.load(part)
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
    def sources(self) -> list[Source]:
        """The sources that are read, in the order of the config."""
        return self._sources

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def close(self) -> None:
        """Ends the thread and closes the files. Only load_state_dict opens the feed again."""
        self._closed = True
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        for reader in self._readers:
            reader.close()

    def _open_sources(self, opened: Mapping[str, Source]) -> tuple[list[Source], list[Keeps]]:
        config, fraction = self._config, self._config.validation_fraction
        own = self._validation and bool(config.validation_sources)
        chosen, section = config.sources, "sources"
        if own:
            chosen, section = config.validation_sources, "validation_sources"
        split = fraction > 0 and not config.validation_sources
        if self._validation and not own and not split:
            raise DataError(
                "there is no validation text: set data.validation_sources, or "
                "data.validation_fraction above 0, or train.validation_every = 0."
            )
        sources: list[Source] = []
        keeps: list[Keeps] = []
        for index, source in enumerate(chosen):
            key = f"data.{section}[{index}]"
            sources.append(opened.get(key) or open_source(source, key, config.streams))
            keeps.append(
                partial(_in_split, f"{self._seed} {key}", fraction, self._validation)
                if split
                else _every_row
            )
        return sources, keeps

    def _build_streams(self) -> None:
        """Every hosted stream at its start, over block readers that they share."""
        config = self._config
        self._bad_rows = BadRows(config.max_bad_rows, self._say)
        self._readers = [
            BlockReader(
                source,
                block_rows=block_rows,
                streams=config.streams,
                hosted=frozenset(self._hosted),
                seed=self._seed,
            )
            for source, block_rows in zip(self._sources, self._block_rows, strict=True)
        ]
        self._streams = {stream: self._build_stream(stream) for stream in self._hosted}
        self._taken = Taken({stream: self._state(stream) for stream in self._hosted})

    def _build_stream(self, stream: int) -> tuple[DocumentStream, Packer]:
        parts = [
            SourceStream(
                reader,
                stream,
                tokenizer=self._tokenizer,
                keeps=keeps,
                bad_rows=self._bad_rows,
            )
            for reader, keeps in zip(self._readers, self._keeps, strict=True)
        ]
        weights = [source.config.weight for source in self._sources]
        documents = DocumentStream(parts, Blend(weights, stream))
        return documents, Packer(documents, self._sequence_length)

    def _state(self, stream: int) -> State:
        documents, packer = self._streams[stream]
        return documents.state() | {"last": packer.last}

    def _make(self, first_step: int, number: int) -> Batch:
        step = first_step + number
        start = step * self._global_batch_size
        streams = [(start + sample) % self._config.streams for sample in self._samples]
        sequences = [self._streams[stream][1].next() for stream in streams]
        return Batch(
            step,
            np.stack([sequence.tokens for sequence in sequences]),
            np.stack([sequence.documents for sequence in sequences]),
            {stream: self._state(stream) for stream in streams},
        )

    def _identity(self) -> State:
        """What the order of the data depends on, besides the weights."""
        config = self._config
        return {
            "train.seed": self._seed,
            "data.streams": config.streams,
            "data.shuffle_block": config.shuffle_block,
            "data.validation_fraction": config.validation_fraction,
            "data.tokenizer": f"{self._tokenizer.vocab_size:,} tokens ({self._tokenizer.sha256})",
        } | {source.key: source.fingerprint for source in self._sources}

    def _check_identity(self, saved: State) -> None:
        own = self._identity()
        changed = [key for key in sorted(own | saved) if own.get(key) != saved.get(key)]
        if "data.streams" in changed:  # files are cut according to it: they follow
            changed = [key for key in changed if "sources[" not in key]
        if changed:
            details = "; ".join(
                f"{key} was {_readable(key, saved)} and is now {_readable(key, own)}"
                for key in changed
            )
            raise DataError(
                f"the checkpoint was trained on other data: {details}. Restore that, or start a "
                "new run with another train.run_dir."
            )


def _readable(key: str, identity: State) -> str:
    """A value for people: of a hash its beginning, and what it is of."""
    subject = "the content" if key == "data.tokenizer" else "names and sizes"
    value = str(identity.get(key, "not there"))
    return re.sub(r"\(([0-9a-f]{12})[0-9a-f]+\)", rf"(hash of {subject}: \1)", value)


def merge_states(states: Sequence[State]) -> State:
    """The states of all data ranks after the same step as one that any layout can load."""
    first = states[0]
    assert all(state["step"] == first["step"] for state in states)
    assert all(state["identity"] == first["identity"] for state in states)
    streams = {stream: part for state in states for stream, part in state["streams"].items()}
    assert len(streams) == first["identity"]["data.streams"], sorted(streams)
    return first | {"streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}


def _every_row(file: int, row: int) -> bool:
    return True


def _in_split(key: str, fraction: float, validation: bool, file: int, row: int) -> bool:
    """Rows are set aside for validation by a hash of (seed, source, file, row)."""
    drawn = xxhash.xxh3_64_intdigest(f"{key} {file} {row}".encode()) / 2**64
    return (drawn < fraction) is validation


class _Worker:
    """A thread that makes items 0, 1, 2, ... up to `ahead` ahead of the one who takes them."""

    def __init__(self, make: Callable[[int], Batch], ahead: int) -> None:
        self._made: queue.Queue[Batch | BaseException] = queue.Queue()
        self._room = threading.Semaphore(ahead)
        self._stop = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(make,), name="data", daemon=True)
        self._thread.start()

    def take(self) -> Batch:
        if self._error is None:
            item = self._made.get()
            if isinstance(item, Batch):
                self._room.release()
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        self._stop = True
        self._room.release()
        self._thread.join()

    def _run(self, make: Callable[[int], Batch]) -> None:
        number = 0
        try:
            while True:
                self._room.acquire()
                if self._stop:
                    return
                self._made.put(make(number))
                number += 1
        except BaseException as error:  # raised again where the batch is taken
            self._made.put(error)
