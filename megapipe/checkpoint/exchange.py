"""What the ranks tell each other about a checkpoint, as JSON (never pickle)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megapipe.errors import CheckpointError, MegapipeError

Value = TypeVar("Value")


def all_gather_json(value: object, group: dist.ProcessGroup | None) -> list[Any]:
    """The JSON values of all ranks of `group` (None: the default group), in rank order."""
    padded, sizes = _pack(value, group)
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return _unpack(received, sizes)


def gather_json(value: object, group: dist.ProcessGroup | None) -> list[Any] | None:
    """As `all_gather_json`, but only the group's first rank receives; the others get None."""
    padded, sizes = _pack(value, group)
    is_first = dist.get_rank(group) == 0
    received = [torch.empty_like(padded) for _ in sizes] if is_first else None
    dist.gather(padded, received, group=group, group_dst=0)
    return _unpack(received, sizes) if received else None


def _pack(value: object, group: dist.ProcessGroup | None) -> tuple[Tensor, list[int]]:
    """This rank's bytes, padded to the longest, and the length of every rank's."""
    on_gpu = dist.get_backend(group) == dist.Backend.NCCL
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    data = bytearray(json.dumps(value, allow_nan=False).encode("ascii"))
    size = torch.tensor([len(data)], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(one) for one in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(data, dtype=torch.uint8)
    return padded, lengths


def _unpack(received: list[Tensor], sizes: list[int]) -> list[Any]:
    pairs = zip(received, sizes, strict=True)
    return [json.loads(part[:size].cpu().numpy().tobytes()) for part, size in pairs]


@dataclass(frozen=True)
class Peers:
    """The ranks that save or check one checkpoint together. Its methods are collectives."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def all_gather(self, value: object) -> list[Any]:
        return [value] if self.size == 1 else all_gather_json(value, self.group)

    def gather(self, value: object) -> list[Any] | None:
        return [value] if self.size == 1 else gather_json(value, self.group)

    def together(
        self,
        action: Callable[[], Value],
        what: str,
        share: Callable[[Value], object] = lambda _: None,
    ) -> tuple[Value, list[Any]]:
        """Run `action` on every rank. If it raises on any, all ranks raise, so that none waits.

        Returns this rank's result, and what `share` (to JSON) makes of every rank's. The
        CheckpointError says what failed (`what`) and where; a failure that is no user's doing is
        raised again as it is on the rank that had it.
        """
        failure: Exception | None = None
        results: list[Value] = []
        try:
            results.append(action())
        except Exception as error:
            failure = error
        shared = [share(result) for result in results]
        reports = self.all_gather({"failure": _report(failure), "shared": shared})
        failed = [
            f"rank {rank}: {report['failure']}" if self.size > 1 else report["failure"]
            for rank, report in enumerate(reports)
            if report["failure"] is not None
        ]
        if not failed:
            return results[0], [report["shared"][0] for report in reports]
        if failure and not isinstance(failure, OSError | MegapipeError):
            raise failure
        more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise CheckpointError(f"{what}: {failed[0]}{more}") from failure

    def from_first(self, action: Callable[[], object], what: str) -> Any:
        """Run `action` on the first rank alone; all ranks get its result (JSON), or all raise."""
        _, shared = self.together(
            lambda: action() if self.rank == 0 else None, what, share=lambda value: value
        )
        return shared[0]


def _report(failure: Exception | None) -> str | None:
    if failure is None:
        return None
    if isinstance(failure, MegapipeError):
        return str(failure)
    if isinstance(failure, OSError):
        where = f" ({failure.filename})" if failure.filename else ""
        return f"{(failure.strerror or str(failure)).lower()}{where}"
    return f"{type(failure).__name__}: {failure}"
