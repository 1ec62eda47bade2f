"""A directory that is there when it is whole, and not before."""

from collections.abc import Callable
from pathlib import Path

from megapipe.checkpoint.attempt import Attempt
from megapipe.checkpoint.steps import clear_attempts, commit_new, require_free
from megapipe.checkpoint.storage import (
    checkpoint_errors,
    remove_tree,
    require_space,
    space_explained,
)
from megapipe.distributed.rank_group import ALONE, RankGroup
from megapipe.files import shown

FILE_MODE = 0o666
"""Of a file that is for others to read: what the umask leaves of it."""


def write_new_directory(
    target: Path,
    needed: int,
    write: Callable[[Path], None],
    *,
    finish: Callable[[Path], None] | None = None,
    accept: Callable[[Path], None] | None = None,
    ranks: RankGroup = ALONE,
) -> Path:
    """Make the directory `target`, of about `needed` bytes; collective over `ranks`, which share a
    file system.

    `write` is called on every rank, then `finish` and `accept` on the first, each with the
    directory under a temporary name. It gets its own when all that is durable. What killed attempts
    left beside it is removed first. Raises CheckpointError where `target` exists, another process
    is writing it, or the system refuses a write, and what `accept` raises, on all ranks alike; then
    nothing is left.
    """
    what, place, attempt = f"cannot write {shown(target)}", target.parent, Attempt()

    @checkpoint_errors()
    def prepare() -> str:
        place.mkdir(parents=True, exist_ok=True)
        require_free(target)
        clear_attempts(target)
        require_space(needed, place)
        return attempt.make(target).name

    folder = place / ranks.from_first(prepare, what)

    @checkpoint_errors()
    def filled(part: Callable[[Path], None]) -> None:
        with space_explained(needed, place):
            part(folder)

    try:
        ranks.in_agreement(lambda: filled(write), what=what)
        if finish is not None:
            ranks.from_first(lambda: filled(finish), what)
        if accept is not None:
            ranks.from_first(lambda: accept(folder))
        commit = checkpoint_errors()(lambda: str(commit_new(folder, target)))
        return Path(ranks.from_first(commit, what))
    except BaseException:
        if ranks.is_first:
            remove_tree(folder)
        raise
    finally:
        attempt.release()
