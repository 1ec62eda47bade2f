"""Which checkpoint to resume from, and which ones to remove."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megapipe.checkpoint.steps import clear_leftovers, committed, remove, step_name
from megapipe.checkpoint.storage import checkpoint_errors
from megapipe.checkpoint.verify import damage, read_manifest
from megapipe.distributed.rank_group import ALONE, RankGroup
from megapipe.errors import CheckpointError


@dataclass(frozen=True)
class Skipped:
    """A committed checkpoint that can't be used, and what is wrong with it."""

    path: Path
    problems: tuple[str, ...]


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest checkpoint that verifies, and the newer ones that don't.

    With `path` None and something in `skipped`, checkpoints exist but none is whole: not a reason
    to start from nothing without being told to.
    """

    path: Path | None
    skipped: tuple[Skipped, ...]


def newest_valid(root: Path, ranks: RankGroup = ALONE) -> NewestCheckpoint:
    """The newest checkpoint in `root` of which every byte verifies; collective over `ranks`.

    The ranks share the reading, and all get the same answer.
    """
    skipped: list[Skipped] = []
    for path in _candidates(ranks, root).values():
        problems = _problems(ranks, path, read=True)
        if not problems:
            return NewestCheckpoint(path, tuple(skipped))
        skipped.append(Skipped(path, problems))
    return NewestCheckpoint(None, tuple(skipped))


def prune(
    root: Path,
    keep: int,
    *,
    keep_every: int = 0,
    trusted: Collection[Path] = (),
    ranks: RankGroup = ALONE,
) -> list[Path]:
    """Remove the checkpoints older than the newest `keep` valid ones; returns what was removed.

    Collective over `ranks`. Valid means that every byte verifies; of those in `trusted` (the ones
    that this run saved itself) only the manifest and the files' sizes are looked at, so that a run
    does not read back what it has just written. Damaged ones don't count towards `keep`; with fewer
    than `keep` valid ones nothing is removed. Nor is a symbolic link, or what it leads to. What
    killed runs left half-written goes too. Those whose step is a multiple of `keep_every`, unless
    that is 0, are never removed and don't count towards `keep`.
    """
    assert keep >= 1, keep
    assert keep_every >= 0, keep_every
    what = f"cannot remove old checkpoints from {root}"
    ranks.from_first(checkpoint_errors()(lambda: clear_leftovers(root)), what)
    candidates = [
        path
        for step, path in _candidates(ranks, root).items()
        if keep_every == 0 or step % keep_every != 0
    ]
    valid, doomed = 0, []
    for path in candidates:
        if valid == keep:
            doomed += [] if path.is_symlink() else [path]
        elif len(candidates) > keep:
            valid += not _problems(ranks, path, read=path not in trusted)

    @checkpoint_errors()
    def sweep() -> None:
        for path in reversed(doomed):
            remove(path)

    ranks.from_first(sweep, what)
    return doomed


def _candidates(ranks: RankGroup, root: Path) -> dict[int, Path]:
    """The committed checkpoints by step, as the first rank sees them, newest first."""

    @checkpoint_errors()
    def names() -> list[tuple[int, str]]:
        return [(step, path.name) for step, path in committed(root).items()]

    found = ranks.from_first(names, f"cannot list the checkpoints in {root}")
    return {step: root / name for step, name in found}


def _problems(ranks: RankGroup, path: Path, *, read: bool) -> tuple[str, ...]:
    """What is wrong with a checkpoint: all ranks share the reading, the first does the rest."""
    parts = ranks.size if read else 1

    @checkpoint_errors()
    def look() -> list[str]:
        if ranks.rank >= parts:
            return []
        try:
            manifest = read_manifest(path)
            own = damage(path, manifest, part=ranks.rank, parts=parts, read=read)
        except CheckpointError as error:
            return [str(error)]
        if manifest.step is None:
            own.append(f"{path} holds weights alone, which no run can go on from")
        elif path.name.startswith("step-") and path.name != step_name(manifest.step):
            own.append(f"{path} holds step {manifest.step}, not the one of its name")
        return own

    _, found = ranks.in_agreement(look, what=f"cannot check {path}", share=lambda own: own)
    return tuple(dict.fromkeys(problem for part in found for problem in part))
