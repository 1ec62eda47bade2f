"""What ranks tell each other besides tensors: values as JSON (never pickle), and errors.

The rule for errors: what fails on one rank of a group is raised on all of its ranks, so that none
of them waits in a collective for one that has left. A MegapipeError keeps its kind and its text on
every rank. Any other error is a fault of the program: the rank that had it raises it as it is, and
the others a ConnectionError that names rank and fault, so that the cause is printed once.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megapipe.amounts import counted
from megapipe.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    MegapipeError,
    ScheduleError,
    explained,
)

Value = TypeVar("Value")

KINDS: dict[str, type[MegapipeError]] = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        ScheduleError,
        DataError,
        CheckpointError,
        ConversionError,
        MegapipeError,
    )
}
"""The errors that are raised on other ranks too; one derived from them arrives as its base."""


@dataclass(frozen=True)
class RankGroup:
    """The ranks that do something together: all of them call the same method, in the same order.

    `rank` is this process's number in the group, whose first rank is 0. Without a `group` it is a
    process alone, for which every method does the same. Values are JSON, NaN and infinity included:
    whatever they were before, they arrive as lists, dicts with string keys, and scalars.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> "RankGroup":
        """The ranks of a process group; None, as an axis of one rank has it, is a process alone."""
        if group is None:
            return ALONE
        return RankGroup(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: object) -> list[Any]:
        """The values of all ranks, in rank order."""
        _, values = self.in_agreement(lambda: value, share=_itself)
        return values

    def gather(self, value: object) -> list[Any] | None:
        """As `all_gather`, but only the first rank receives the values; the others get None."""
        content, _ = self.in_agreement(lambda: _encode(value))
        if self.group is None:
            return [json.loads(content)]
        padded, sizes = self._pad(content)
        received = [torch.empty_like(padded) for _ in sizes] if self.is_first else None
        dist.gather(padded, received, group=self.group, group_dst=0)
        return _unpack(received, sizes) if received else None

    def from_first(self, action: Callable[[], object], what: str | None = None) -> Any:
        """Run `action` on the first rank alone; all ranks get its result, or all raise its error.

        `what` failed, for the text of the error; without it the text stays as it is.
        """
        content, failure = b"", None
        if self.is_first:
            _, content, failure = _attempt(action, _itself)
        report = self._broadcast(content)
        self._raise_failures([report], failure, what)
        return report["value"]

    def on_first(self, action: Callable[[], Value], what: str | None = None) -> Value | None:
        """As `from_first`, but the result may be anything and stays there: the others get None."""
        results: list[Value] = []
        self.from_first(lambda: results.append(action()), what)
        return results[0] if results else None

    def in_agreement(
        self,
        action: Callable[[], Value],
        *,
        what: str | None = None,
        share: Callable[[Value], object] = lambda _: None,
    ) -> tuple[Value, list[Any]]:
        """Run `action` on every rank; where it fails on any, all raise.

        Returns this rank's result, and what `share` makes of every rank's. The error is of the
        first failed rank's kind and says `what` failed and where; without `what` it has the text of
        that rank alone.
        """
        results, content, failure = _attempt(action, share)
        reports = self._all_gather(content)
        self._raise_failures(reports, failure, what)
        return results[0], [report["value"] for report in reports]

    def shared_error(self, own: Exception | None) -> Exception | None:
        """The error that every rank is to raise where any has one of its `own`."""
        return self._error_of(self._all_gather(_report(own, None)), own, None)

    # --- Errors ----------------------------------------------------------------------------------

    def _raise_failures(
        self, reports: Sequence[dict[str, Any]], own: Exception | None, what: str | None
    ) -> None:
        error = self._error_of(reports, own, what)
        if error is not None:
            raise error

    def _error_of(
        self, reports: Sequence[dict[str, Any]], own: Exception | None, what: str | None
    ) -> Exception | None:
        """This rank's error after all have said how they fared; None where all are well."""
        failures = {
            rank: _Failure(**report["failure"])
            for rank, report in enumerate(reports)
            if report["failure"] is not None
        }
        faults = {rank: failure for rank, failure in failures.items() if failure.kind is None}
        if self.rank in faults:
            return own
        if faults:
            rank, failure = next(iter(faults.items()))
            return ConnectionError(f"{self._name(rank)} has failed: {failure.texts[0]}")
        if not failures:
            return None
        rank, failure = next(iter(failures.items()))
        if what is None:
            error = failure.rebuild()
        else:
            where = f"{self._name(rank)}: " if self.size > 1 else ""
            error = failure.rebuild(f"{what}: {where}", _and_more(len(failures) - 1))
        error.__cause__ = own
        return error

    def _name(self, rank: int) -> str:
        """By its number in the world, as all messages name ranks."""
        return f"rank {rank if self.group is None else dist.get_global_rank(self.group, rank)}"

    # --- Bytes -----------------------------------------------------------------------------------

    def _all_gather(self, content: bytes) -> list[Any]:
        if self.group is None:
            return [json.loads(content)]
        padded, sizes = self._pad(content)
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded, group=self.group)
        return _unpack(received, sizes)

    def _broadcast(self, content: bytes) -> Any:
        """The first rank's value, on every rank."""
        if self.group is None:
            return json.loads(content)
        size = torch.tensor([len(content)], dtype=torch.int64, device=self._device)
        dist.broadcast(size, group=self.group, group_src=0)
        received = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        if self.is_first:
            received.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(received, group=self.group, group_src=0)
        return _unpack([received], [len(received)])[0]

    def _pad(self, content: bytes) -> tuple[Tensor, list[int]]:
        """This rank's bytes, padded to the longest, and the length of every rank's."""
        size = torch.tensor([len(content)], dtype=torch.int64, device=self._device)
        sizes = [torch.empty_like(size) for _ in range(self.size)]
        dist.all_gather(sizes, size, group=self.group)
        lengths = [int(one) for one in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self._device)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return padded, lengths

    @property
    def _device(self) -> torch.device:
        """Where the collectives take their bytes: NCCL's in the memory of this rank's GPU."""
        if dist.get_backend(self.group) == dist.Backend.NCCL:
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


ALONE = RankGroup()
"""A process that has no others."""


def first_to_report(store: dist.Store, text: str) -> bool:
    """Whether no rank has asked this of `text` before: one of many ranks then prints what all know.

    For ranks that are about to leave, each at its own time, so this is no collective: it needs
    the store in which they met. True also where that is gone, so that nothing remains unsaid.
    """
    try:
        return store.add(f"told/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except dist.DistError:
        return True


@dataclass(frozen=True)
class _Failure:
    """A rank's error as the others hear of it. Without a `kind` it is a fault of the program."""

    kind: str | None
    texts: list[str]
    """One for each problem of a ConfigError; one for any other error."""
    notes: list[str]

    @staticmethod
    def of(error: Exception) -> "_Failure":
        users = explained(error)
        if users is None:
            return _Failure(None, [repr(error)], [])
        kind = next(base.__name__ for base in type(users).__mro__ if base in KINDS.values())
        texts = users.problems if isinstance(users, ConfigError) else [str(users)]
        return _Failure(kind, texts, users.notes)

    def rebuild(self, before: str = "", after: str = "") -> MegapipeError:
        assert self.kind is not None
        texts = [f"{before}{text}{after}" for text in self.texts]
        error: MegapipeError
        if self.kind == ConfigError.__name__:
            error = ConfigError(texts)
        else:
            error = KINDS[self.kind](texts[0])
        for note in self.notes:
            error.add_note(note)
        return error


def _attempt(
    action: Callable[[], Value], share: Callable[[Value], object]
) -> tuple[list[Value], bytes, Exception | None]:
    """Run `action`: its result in a list, the report of it, and the error where there is one.

    A result that can't be sent is an error like any other, which the other ranks must hear of.
    """
    try:
        result = action()
        return [result], _report(None, share(result)), None
    except Exception as error:
        return [], _report(error, None), error


def _report(failure: Exception | None, value: object) -> bytes:
    told = None if failure is None else asdict(_Failure.of(failure))
    return _encode({"failure": told, "value": value})


def _encode(value: object) -> bytes:
    return json.dumps(value).encode("ascii")


def _unpack(received: Sequence[Tensor], sizes: Sequence[int]) -> list[Any]:
    pairs = zip(received, sizes, strict=True)
    return [json.loads(part[:size].cpu().numpy().tobytes()) for part, size in pairs]


def _and_more(ranks: int) -> str:
    """` (and 1 more rank)`, or nothing."""
    return f" (and {counted(ranks, 'more rank')})" if ranks else ""


def _itself(value: object) -> object:
    return value
