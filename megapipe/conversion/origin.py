"""Which model of another stack the weights of a run came from, as checkpoints keep it. No torch."""

from collections.abc import Mapping
from pathlib import Path

from megapipe.checkpoint.steps import committed
from megapipe.checkpoint.verify import read_manifest
from megapipe.conversion.hugging_face.config_file import HuggingFaceConfig
from megapipe.conversion.kind import kind_of
from megapipe.conversion.model_at import Families, find_architecture, megatron_architecture

Origin = dict[str, object]
"""`stack`, `architecture`, and the `name` of its directory."""


def saved_origin(state: Mapping[str, object]) -> Origin | None:
    """What the state of a checkpoint says; None where it says nothing."""
    origin = state.get("origin")
    return origin if isinstance(origin, dict) else None


def origin_at(path: Path, families: Families) -> Origin | None:
    """The model of another stack that lies at `path`, or that the checkpoint there, or a run's
    newest, came from.

    Raises CheckpointError or ConversionError where that can't be read.
    """
    kind = kind_of(path)
    if kind == "checkpoint":
        return saved_origin(read_manifest(path).state)
    if kind == "hugging_face":
        _, architecture = find_architecture(HuggingFaceConfig(path), families)
    elif kind == "megatron":
        _, architecture = megatron_architecture(families)
    else:
        found = [*committed(path / "checkpoints").values(), *committed(path).values()]
        return saved_origin(read_manifest(found[0]).state) if found else None
    return {
        "stack": architecture.stack,
        "architecture": architecture.name,
        "name": path.absolute().name,
    }
