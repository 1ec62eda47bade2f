"""Which checkpoint a user means by a path."""

from pathlib import Path

from megapipe.checkpoint.retention import newest_valid
from megapipe.checkpoint.steps import check_names, committed, has_manifest, refuse_exports
from megapipe.errors import CheckpointError


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`: itself, or the newest whole one of a run."""
    if has_manifest(path):
        return path
    for root in (path / "checkpoints", path):
        if root.is_dir() or root.is_symlink():
            check_names(root)
        if not committed(root):
            continue
        refuse_exports(root)
        found = newest_valid(root)
        if found.path is None:
            raise CheckpointError(
                f"{root} holds no whole checkpoint, of {len(found.skipped)}: "
                f"{found.skipped[0].problems[0].rstrip('.')}. `megapipe inspect {root}` lists them."
            )
        return found.path
    return path  # reading it says what it is
