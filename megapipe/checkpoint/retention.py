"""Which checkpoint to resume from, and which ones to remove."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megapipe.checkpoint.exchange import Peers
from megapipe.checkpoint.steps import clear_leftovers, committed, remove, step_name
from megapipe.checkpoint.verify import damage, read_manifest
from megapipe.errors import CheckpointError


@dataclass(frozen=True)
class Skipped:
    """A committed checkpoint that can't be used, and what is wrong with it."""

    path: Path
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, and the newer ones that don't.

    With `path` None and something in `skipped`, checkpoints exist but none is whole: not a reason
    to start from nothing without being told to.
    """

    path: Path | None
    skipped: tuple[Skipped, ...]


def newest_valid(
    root: Path, *, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None
) -> Found:
    """The newest checkpoint in `root` of which every byte verifies; collective over `group`.

    The ranks share the reading, and all get the same answer.
    """
    peers = Peers(rank, world_size, group)
    skipped: list[Skipped] = []
    for path in _candidates(peers, root):
        problems = _problems(peers, path, read=True)
        if not problems:
            return Found(path, tuple(skipped))
        skipped.append(Skipped(path, problems))
    return Found(None, tuple(skipped))


def prune(
    root: Path,
    keep: int,
    *,
    trusted: Collection[Path] = (),
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
) -> list[Path]:
    """Remove the checkpoints older than the newest `keep` valid ones; returns what was removed.

    Collective over `group`. Valid means that every byte verifies; of those in `trusted` (the ones
    that this run saved itself) only the manifest and the files' sizes are looked at, so that a run
    does not read back what it has just written. Damaged ones don't count towards `keep`; with fewer
    than `keep` valid ones nothing is removed. Nor is a symbolic link, or what it leads to. What
    killed runs left half-written goes too.
    """
    assert keep >= 1, keep
    peers = Peers(rank, world_size, group)
    what = f"cannot remove old checkpoints from {root}"
    peers.from_first(lambda: clear_leftovers(root), what)
    candidates = _candidates(peers, root)
    valid, doomed = 0, []
    for path in candidates:
        if valid == keep:
            doomed += [] if path.is_symlink() else [path]
        elif len(candidates) > keep:
            valid += not _problems(peers, path, read=path not in trusted)

    def sweep() -> None:
        for path in reversed(doomed):
            remove(path)

    peers.from_first(sweep, what)
    return doomed


def _candidates(peers: Peers, root: Path) -> list[Path]:
    """The committed checkpoints as the first rank sees them, newest first."""
    names = peers.from_first(
        lambda: [path.name for path in committed(root).values()],
        f"cannot list the checkpoints in {root}",
    )
    return [root / name for name in names]


def _problems(peers: Peers, path: Path, *, read: bool) -> tuple[str, ...]:
    """What is wrong with a checkpoint: all ranks share the reading, the first does the rest."""
    own: list[str] = []
    parts = peers.size if read else 1
    try:
        if peers.rank < parts:
            manifest = read_manifest(path)
            own = damage(path, manifest, part=peers.rank, parts=parts, read=read)
            if path.name.startswith("step-") and path.name != step_name(manifest.step):
                own.append(f"{path} holds step {manifest.step}, not the one of its name")
    except CheckpointError as error:
        own = [str(error)]
    return tuple(dict.fromkeys(problem for part in peers.all_gather(own) for problem in part))
