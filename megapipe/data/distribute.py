"""One reader per replica: its first rank reads, the others receive the tokens by broadcast.

Each step is one int32 broadcast: tokens, the number of each target's source, and document numbers
where attention is masked by them.
The host reads none of it, so it need not wait for the device. A reader that failed sends zeros, and
says so in the step's own reduction. At the start, and when a state is loaded, its error is raised
on every rank at once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megapipe.data.feed import Batch, BatchFeed, State, merge_states
from megapipe.data.order.record import RECORD
from megapipe.data.sources import Source
from megapipe.data.tokenizer import check_vocabulary, load_tokenizer
from megapipe.distributed.mesh import Mesh
from megapipe.distributed.rank_group import Value
from megapipe.errors import explained
from megapipe.layout.layout import Layout
from megapipe.microbatch import MicroBatch
from megapipe.step_sums import Given, StepPart, StepSums, Totals
from megapipe.transfer import to_device

SOURCE_BYTES, SOURCE_EPOCHS = "source.bytes", "source.epochs"
"""Quantities with a place for each source: bytes of text in the step, and passes so far."""

BATCH_HASH = "batch.hash"
HASH_PIECES = 4

WAITED, SLOW_SOURCE, SLOW_FILE = "wait.seconds", "wait.source", "wait.file"
"""Quantities with a place for each replica: how long it waited for its batch, and the numbers of
the source and of its file on which its reader spent most time."""


class SlowReader(NamedTuple):
    """The replica that waited longest for the data of a step, and what it was reading."""

    replica: int
    wait_seconds: float
    source: str
    file: str


COUNTS = ("skipped_rows", "skipped_bytes", "unreadable_bytes", "empty_rows", "excluded_rows")
"""What a feed gives in each step beside its epoch: fields of a step's metrics."""


class ReplicaFeed(StepPart):
    """Gives every rank its microbatches of step 0, 1, 2, ...

    Constructor and `load` are collective over the world and raise the error of any reader on all
    ranks; `state` is collective over the batch axis. A rank gets tokens only if it hosts the first
    stage, targets only if it hosts the last.

    `next` is collective over the replica. Where the reader fails, `failed` is True on the rank that
    reads and the replica gets stand-ins (zeros), so that it goes through the step with the other
    replicas. The loop tells all ranks in the step's own reduction; nobody takes that step, and all
    call `take_back` and `shared_failure`. Any other error, such as that of a broadcast, is raised.

    With `validation` it gives the validation batches; `restart` begins with the first again. Those
    given before are kept in host memory, 4 bytes a token, and not read twice. `other` is a feed of
    the same layout and mesh: the sources that it has opened are not opened again.
    """

    def __init__(
        self,
        layout: Layout,
        mesh: Mesh,
        *,
        validation: bool = False,
        other: "ReplicaFeed | None" = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._layout = layout
        self._config = layout.config
        self._mesh = mesh
        self._hosts_first = layout.stages[0].rank == mesh.pipeline.rank
        self._hosts_last = layout.stages[-1].rank == mesh.pipeline.rank
        self._validation = validation
        self._step = 0
        self._given: list[Tensor] = []
        self._failure: Exception | None = None
        self._batch: Batch | None = None
        reader = other.reader if other else None
        opened = reader.sources if reader else []
        self._feed = self._on_readers(lambda: self._open(opened, say))

    def next(self) -> list[MicroBatch]:
        """The microbatches of the next step, in order."""
        if self._step < len(self._given):
            wire = to_device(self._given[self._step], self._mesh.device)
        else:
            wire = self._receive()
            if self._validation:
                self._given.append(wire.cpu())
        batches = self._split(wire)
        self._step += 1
        return batches

    def restart(self) -> None:
        """Begins again with the first validation batch."""
        assert self._validation
        self._step = 0

    @property
    def failed(self) -> bool:
        """This rank reads for its replica, and could not give the last batch."""
        return self._failure is not None

    def take_back(self) -> None:
        """Make `state` the one before the last `next`, which is the end of this feed."""
        self._step -= 1
        if self._feed is not None and not self.failed:
            self._feed.take_back()

    def shared_failure(self) -> Exception:
        """Why a replica has no batch, on every rank, as `RankGroup.shared_error` has it.

        Collective over the world, after a `next` that failed on some replica.
        """
        error = self._mesh.world.rank_group.shared_error(self._failure)
        assert error is not None, "called after a next that failed"
        return error

    def state(self) -> State:
        """The state of all streams behind the last step, on readers; empty on other ranks.

        Collective over the batch axis of the readers.
        """
        if self._feed is None:
            return {}
        return merge_states(self._mesh.batch.rank_group.all_gather(self._feed.state_dict()))

    def load(self, state: State) -> None:
        """Goes on behind `state`, saved in any layout. Every rank passes the same state."""
        assert not self._validation

        def work() -> None:
            assert self._feed is not None
            self._feed.load_state_dict(state)

        self._on_readers(work)
        self._step = state["step"]

    @property
    def reader(self) -> BatchFeed | None:
        """The feed that this rank reads for its replica; None on ranks that do not read."""
        return self._feed

    def register(self, sums: StepSums) -> None:
        for name in COUNTS:
            sums.register(name)
        sums.register_maximum("epoch", self._mesh.batch)
        for name in (SOURCE_BYTES, SOURCE_EPOCHS):
            sums.register(name, len(self._config.data.sources))
        sums.register(BATCH_HASH, HASH_PIECES)
        for name in (WAITED, SLOW_SOURCE, SLOW_FILE):
            sums.register(name, self._layout.replicas)

    def given(self) -> dict[str, Given]:
        """What this rank's reader has skipped and how often it has begun anew; {} elsewhere."""
        if self._feed is None:
            return {}
        account = self._feed.account
        return {
            "skipped_rows": account.skipped.total(),
            "skipped_bytes": account.skipped_bytes,
            "unreadable_bytes": account.unreadable_bytes,
            "empty_rows": account.empty_rows,
            "excluded_rows": account.excluded_rows,
            "epoch": self._feed.epoch,
            **self._by_source(self._feed),
        }

    def _by_source(self, feed: BatchFeed) -> dict[str, Given]:
        """What the last batch had of each source, and the batch's hash in pieces that a sum of
        float64 keeps exactly."""
        names = [source.name for source in feed.sources]
        if self._batch is None:
            return {}
        bytes_, streams = self._batch.text_bytes, feed.streams
        return {
            SOURCE_BYTES: {place: bytes_[name] for place, name in enumerate(names)},
            SOURCE_EPOCHS: {place: feed.epochs[name] / streams for place, name in enumerate(names)},
            BATCH_HASH: dict(enumerate(hash_pieces(self._batch.hash))),
            **self._waiting(feed, self._batch),
        }

    def _waiting(self, feed: BatchFeed, batch: Batch) -> dict[str, Given]:
        """How long this replica waited for its batch, and on which file its reader spent most."""
        replica = self._mesh.batch.rank
        place = next(
            place for place, one in enumerate(feed.sources) if one.name == batch.slowest.source
        )
        number = feed.sources[place].file_numbers.get(batch.slowest.file, 0)
        return {
            WAITED: {replica: feed.wait_seconds},
            SLOW_SOURCE: {replica: place},
            SLOW_FILE: {replica: number},
        }

    def slowest(self, totals: Totals) -> SlowReader | None:
        """The replica that waited longest for its data, on a rank that reads; None elsewhere."""
        if self._feed is None:
            return None
        waits = totals.all(WAITED)
        replica = max(range(len(waits)), key=waits.__getitem__)
        source = self._feed.sources[int(totals.all(SLOW_SOURCE)[replica])]
        file = source.file_keys[int(totals.all(SLOW_FILE)[replica])]
        return SlowReader(replica, waits[replica], source.name, str(source.root / file))

    def close(self) -> None:
        if self._feed:
            self._feed.close()

    @property
    def _masked(self) -> bool:
        return self._config.data.mask_documents

    def _open(self, opened: Sequence[Source], say: Callable[[str], None] | None) -> BatchFeed:
        config = self._config
        tokenizer = load_tokenizer(config.data.tokenizer)
        assert config.model.vocab_size is not None
        check_vocabulary(tokenizer, config.model.vocab_size, config.checkpoint.load_from)
        return BatchFeed(
            config.data,
            seed=config.train.seed,
            tokenizer=tokenizer,
            replica=self._mesh.batch.rank,
            replicas=self._layout.replicas,
            global_batch_size=config.train.global_batch_size,
            sequence_length=config.train.sequence_length,
            validation=self._validation,
            opened=opened,
            record=Path(config.train.run_dir) / RECORD,
            say=say,
        )

    def _on_readers(self, action: Callable[[], Value]) -> Value | None:
        """Run `action` on the reader of each replica; None on other ranks."""
        is_reader = self._mesh.model_parallel.is_first
        result, _ = self._mesh.world.rank_group.in_agreement(
            lambda: action() if is_reader else None
        )
        return result

    def _receive(self) -> Tensor:
        """The next step's wire tensor, on the device."""
        wire = self._empty_wire()
        if self._feed is not None:
            batch = self._next_batch(self._feed)
            if batch is not None:
                parts = [batch.tokens, batch.sources]
                parts += [batch.documents] if self._masked else []
                content = np.concatenate([part.reshape(-1) for part in parts])
                wire.copy_(torch.from_numpy(content))
        return _broadcast(self._mesh, wire)

    def _next_batch(self, feed: BatchFeed) -> Batch | None:
        """None where it can't be read; nothing but the reader's own errors counts as that."""
        try:
            self._batch = next(feed)
            return self._batch
        except Exception as error:
            self._failure = explained(error) or error
            return None

    def _empty_wire(self) -> Tensor:
        """Room for a step's tokens and documents."""
        count, length = self._layout.samples, self._config.train.sequence_length
        size = count * (length + 1) + count * length * (2 if self._masked else 1)
        return torch.zeros(size, dtype=torch.int32)

    def _split(self, wire: Tensor) -> list[MicroBatch]:
        train, replica = self._config.train, self._mesh.batch.rank
        count, length, size = self._layout.samples, train.sequence_length, train.micro_batch_size
        end = count * (length + 1)
        tokens = wire[:end].view(count, length + 1)
        inputs = tokens[:, :-1].long() if self._hosts_first else None
        targets = tokens[:, 1:].long() if self._hosts_last else None
        begin, end = end, end + count * length
        sources = wire[begin:end].view(count, length) if self._hosts_last else None
        documents = wire[end:].view(count, length) if self._masked else None
        samples = torch.arange(count, device=wire.device) * self._layout.replicas + replica
        samples += self._step * train.global_batch_size

        def part(tensor: Tensor | None, start: int) -> Tensor | None:
            return None if tensor is None else tensor[start : start + size]

        return [
            MicroBatch(
                tokens_BS=part(inputs, start),
                targets_BS=part(targets, start),
                documents_BS=part(documents, start),
                samples_B=samples[start : start + size],
                sources_BS=part(sources, start),
            )
            for start in range(0, count, size)
        ]


def hash_pieces(value: int) -> list[int]:
    """Pieces of 16 bits, the lowest first."""
    return [value >> 16 * piece & 0xFFFF for piece in range(HASH_PIECES)]


def joined_hash(sums: Sequence[float]) -> str:
    """The sum of hashes modulo 2**64, in hex, of the sums of their pieces."""
    total = sum(int(part) << 16 * piece for piece, part in enumerate(sums))
    return f"{total % (1 << 64):016x}"


def _broadcast(mesh: Mesh, wire: Tensor) -> Tensor:
    """The reader's `wire` on every rank of its replica, on the device."""
    replica = mesh.model_parallel
    wire = to_device(wire, mesh.device)
    if replica.size > 1:
        dist.broadcast(wire, src=replica.ranks[0], group=replica.group)
    return wire
