"""Megatron checkpoints of either kind, by their path."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megapipe.checkpoint.storage import read_small
from megapipe.conversion.kind import MEGATRON_TRACKER as TRACKER
from megapipe.conversion.megatron.assembly import GlobalTensor
from megapipe.conversion.megatron.legacy import read_rank_directories
from megapipe.conversion.megatron.optimizer_format import (
    optimizer_format,
    optimizer_groups,
    optimizer_state,
    optimizer_steps,
)
from megapipe.conversion.megatron.plain import plain_arguments
from megapipe.conversion.megatron.sharing import OWN_NORMS
from megapipe.conversion.megatron.torch_dist import CONFIG, METADATA, NOT_WEIGHTS, read_distributed
from megapipe.errors import CheckpointError
from megapipe.files import reason, shown

MAX_TRACKER_BYTES = 100
ITERATION = re.compile(r"iter_(\d{1,12})")


@dataclass(frozen=True)
class MegatronCheckpoint:
    """The model in a Megatron checkpoint: global tensors under Megatron's names, whatever the
    layout of the run that wrote it. Layers are numbered over the whole model; the rows of a gated
    `linear_fc1` are those of the gate, then those of the other half; the vocabulary is padded."""

    path: Path
    """The `iter_...` directory."""
    kind: str
    """`torch_dist` or `torch` (a directory for each rank), as Megatron's --ckpt-format has it."""
    iteration: int | None
    arguments: Mapping[str, object]
    """Megatron's command line as it was when the checkpoint was saved, in plain values."""
    tensors: Mapping[str, GlobalTensor]
    optimizer: str | None
    """The format of the optimizer's state; None where there is none."""
    state: Mapping[str, Mapping[str, GlobalTensor]]
    """The optimizer's state by kind ("exp_avg", "exp_avg_sq", "param" or "fp32_param" for master
    weights), each under the names of the weights. Empty for formats that are not read."""
    steps: int | None = None
    """How many the optimizer has taken; None where its state is not read, or that isn't said."""
    groups: Sequence[Mapping[str, object]] = ()
    """The settings of each of its groups of parameters, in plain values."""

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return shown(self.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(
        self,
        name: str,
        start: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Rectangle [start, start + shape) of a tensor (all of it by default), on the CPU.

        The dtype is the one saved, or `dtype`: values are then rounded to it. Raises
        CheckpointError naming tensor and file.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        try:
            return self.tensors[name].read(start, shape, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {name} of {self.path}: {error}") from None


def open_megatron(path: str | Path) -> MegatronCheckpoint:
    """Open the newest checkpoint of a Megatron run directory, or an `iter_...` directory.

    Reads where the tensors lie, and none of them. Nothing that the files hold is run. Raises
    CheckpointError for what is missing, damaged, or of a format that is not read.
    """
    directory = _iteration_directory(Path(path))
    try:
        if _is_file(directory / METADATA) or _is_file(directory / CONFIG):
            return _open_distributed(directory)
        if any(directory.glob("mp_rank_*")):
            found = read_rank_directories(directory)
            number = _iteration(directory, found.iteration)
            return MegatronCheckpoint(
                directory,
                "torch",
                number,
                found.arguments,
                with_fused_norms(found.tensors),
                found.optimizer,
                {},
            )
    except OSError as error:
        raise CheckpointError(f"{directory} can't be read: {reason(error)}") from error
    raise CheckpointError(
        f"{directory} is no Megatron checkpoint: it has neither {METADATA} and {CONFIG} "
        "(torch_dist) nor directories mp_rank_00, ... (torch)"
    )


def with_fused_norms(tensors: Mapping[str, GlobalTensor]) -> dict[str, GlobalTensor]:
    """The same tensors, where the norms before attention and MLP have the names that they have in
    Transformer Engine's layers, as in every distributed checkpoint."""
    named: dict[str, GlobalTensor] = {}
    for name, tensor in tensors.items():
        for own, fused in OWN_NORMS.items():
            name = name.replace(own, fused)
        if name in named:
            raise CheckpointError(f"tensor {name} is there under two names")
        named[name] = tensor
    return named


def _open_distributed(directory: Path) -> MegatronCheckpoint:
    found = read_distributed(directory)
    named = with_fused_norms(found.tensors)
    weights = {name: tensor for name, tensor in named.items() if not name.startswith(NOT_WEIGHTS)}
    found = replace(found, tensors=named)
    state = optimizer_state(found, weights)
    return MegatronCheckpoint(
        directory,
        "torch_dist",
        _iteration(directory, found.common.get("iteration")),
        plain_arguments(found.common.get("args")),
        weights,
        optimizer_format(found),
        state,
        optimizer_steps(found) if state else None,
        optimizer_groups(found) if state else (),
    )


def _iteration_directory(path: Path) -> Path:
    """The directory of the newest checkpoint of a run, which its tracker file names."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory")
    if not (path / TRACKER).exists():
        return path
    text = read_small(path / TRACKER, MAX_TRACKER_BYTES).decode("utf-8", "replace").strip()
    if text != "release" and not re.fullmatch(r"[0-9]{1,12}", text):
        raise CheckpointError(
            f'{path / TRACKER} says {shown(text)!r}, which is neither an iteration nor "release"'
        )
    directory = path / (text if text == "release" else f"iter_{int(text):07d}")
    if directory.is_symlink():
        raise CheckpointError(f"{directory} is a symbolic link. Name the directory it leads to.")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing, though {path / TRACKER} names it")
    return directory


def _iteration(directory: Path, saved: object) -> int | None:
    if type(saved) is int:
        return saved
    match = ITERATION.fullmatch(directory.name)
    return int(match[1]) if match else None


def _is_file(path: Path) -> bool:
    return path.is_file() or path.is_symlink()
