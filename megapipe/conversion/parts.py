"""Which parts of a run can be taken from what checkpoint.load_from names.

No torch, but where the optimizer's state is taken from a checkpoint of Megatron's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megapipe.checkpoint.verify import read_manifest
from megapipe.config import CheckpointConfig
from megapipe.config.checkpoint import Loaded
from megapipe.config.problems import show
from megapipe.conversion.kind import kind_of
from megapipe.errors import CheckpointError
from megapipe.files import shown


def check_parts(settings: CheckpointConfig) -> None:
    """Raises CheckpointError where checkpoint.load_state asks for a part that isn't there."""
    assert settings.load_from is not None
    path, wanted = Path(settings.load_from), settings.load_state
    kind, there = _parts_at(path)
    beyond = [part for part in wanted if part not in there]
    if beyond:
        rest = [part for part in wanted if part in there] or there[:1]
        raise CheckpointError(
            f"checkpoint.load_state = {show(wanted)} asks for {show(beyond[0])}, and "
            f'checkpoint.load_from = "{shown(path)}" is {kind}, which gives a run '
            f"{' and '.join(there)}. Set checkpoint.load_state = {show(rest)}."
        )
    if "optimizer" in wanted and kind_of(path) == "megatron":
        from megapipe.conversion.megatron.directory import open_megatron
        from megapipe.conversion.optimizer_source import check_megatron_optimizer

        check_megatron_optimizer(open_megatron(path))


def _parts_at(path: Path) -> tuple[str, Sequence[Loaded]]:
    """What lies at `path` in words, and which parts of a run can be taken from it."""
    kind = kind_of(path)
    if kind == "hugging_face":
        return "a Hugging Face model", ["weights"]
    if kind == "megatron":
        return "a Megatron checkpoint", ["weights", "optimizer"]
    if kind == "checkpoint" and read_manifest(path).step is None:
        return "a checkpoint of weights alone", ["weights"]
    return "a checkpoint", get_args(Loaded)
