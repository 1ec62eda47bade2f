"""Where a conversion reads and writes, looked at before it begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapipe.checkpoint.find import find_checkpoint
from megapipe.conversion.kind import HUGGING_FACE_CONFIG as CONFIG
from megapipe.conversion.kind import kind_of
from megapipe.conversion.model_at import refuse_hub_name
from megapipe.errors import ConversionError
from megapipe.files import shown

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".ckpt")
"""How names of files with weights end."""


def require_model(source: Path) -> None:
    """Raises ConversionError where a path can't be a model, with what it seems to be instead.

    A run that has saved nothing passes: reading it says so.
    """
    place = shown(source)
    refuse_hub_name(source)
    if not source.exists():
        raise ConversionError(f"{place} does not exist.")
    if not source.is_dir():
        raise ConversionError(
            f"{place} is a file. Name the directory of a model: of Hugging Face's, of Megatron's, "
            "or a checkpoint or run of megapipe."
        )
    if kind_of(source) is not None:
        return
    find_checkpoint(source)  # raises where a link or a name is why none is seen
    files = sorted(path.name for path in source.iterdir() if path.suffix.lower() in WEIGHTS)
    if files and files[0].endswith(".gguf"):
        raise ConversionError(
            f"{place} has its weights as {shown(files[0])}, which is not read. Take the original "
            f"model, with {CONFIG} and safetensors files."
        )
    if files:
        raise ConversionError(
            f"{place} has weights ({shown(files[0])}) and no {CONFIG}: download the whole "
            "directory of the model."
        )
    snapshot = next((source / "snapshots").glob("*/" + CONFIG), None)
    if snapshot is not None:
        raise ConversionError(
            f"{place} is a cache of Hugging Face's. Name a snapshot in it: {shown(snapshot.parent)}"
        )
    raise ConversionError(
        f"{place} holds no model: neither {CONFIG}, as those of Hugging Face, nor a checkpoint of "
        "Megatron's, nor one of megapipe."
    )


def check_target(source: Path, target: Path) -> None:
    """Raises ConversionError where `target` lies inside of the model that is read (in a run's
    directory it may), or below something that is no directory."""
    home = source.resolve()
    if home in target.resolve().parents and not (source / "checkpoints").exists():
        raise ConversionError(
            f"{shown(target)} lies inside of {shown(source)}, which stays as it is. Name a "
            "directory elsewhere."
        )
    there = next(parent for parent in target.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ConversionError(f"{shown(there)} is a file, so there can be no {shown(target)}.")


@contextmanager
def new_parents_removed(target: Path) -> Iterator[None]:
    """Where the body raises, remove the directories above `target` that were not there before."""
    new = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in new:
            try:
                parent.rmdir()
            except OSError:  # not made yet, or something else is in it
                continue
        raise
