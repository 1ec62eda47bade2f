"""What the ranks tell each other about a checkpoint, and failures that reach all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from megapipe.distributed.exchange import all_gather_json, gather_json
from megapipe.errors import CheckpointError, MegapipeError

Value = TypeVar("Value")


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
