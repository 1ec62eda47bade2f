"""What lies at a path, by what its directory holds. No torch."""

from pathlib import Path
from typing import Literal

from megapipe.checkpoint.steps import committed, has_manifest

Kind = Literal["checkpoint", "hugging_face", "megatron", "run"]

OTHER_STACKS: tuple[Kind, ...] = ("hugging_face", "megatron")
HUGGING_FACE_CONFIG = "config.json"
MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"
"""Which checkpoint of a Megatron run is the newest."""
DISTRIBUTED = (".metadata", "metadata.json")
"""Files of a distributed checkpoint of Megatron's."""


def kind_of(path: Path) -> Kind | None:
    """A checkpoint of ours, a directory of Hugging Face's, a checkpoint or run of Megatron's, or a
    run of ours (or its folder of checkpoints), which may have no checkpoint yet; None where it
    looks like nothing of these.

    Raises CheckpointError where this user may not see that.
    """
    if has_manifest(path):
        return "checkpoint"  # which may keep a config.json as a part of its tokenizer
    if (path / HUGGING_FACE_CONFIG).is_file():
        return "hugging_face"
    if _is_megatron(path):
        return "megatron"
    return "run" if (path / "checkpoints").exists() or committed(path) else None


def _is_megatron(path: Path) -> bool:
    named = [_is_file(path / name) for name in DISTRIBUTED]
    return _is_file(path / MEGATRON_TRACKER) or all(named) or any(path.glob("mp_rank_*"))


def _is_file(path: Path) -> bool:
    return path.is_file() or path.is_symlink()
