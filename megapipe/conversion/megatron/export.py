"""A checkpoint of ours as Megatron-LM's directories for ranks."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from megapipe.amounts import counted
from megapipe.conversion.megatron.writer import RankGrid, write_rank_directories
from megapipe.conversion.new_directory import write_new_directory
from megapipe.conversion.source import WeightSource
from megapipe.conversion.view import TensorView
from megapipe.errors import ConversionError
from megapipe.layout.architecture import Architecture
from megapipe.layout.foreign_config import ForeignConfig

VOCABULARY_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this for each tensor-parallel rank."""
ALLOWANCE = 2**20
"""Bytes of a rank's file beside its tensors, at most."""


@dataclass(frozen=True)
class MegatronExport:
    """What is to be written, for how many ranks; all weights are rounded to `dtype`."""

    source: WeightSource
    architecture: Architecture
    grid: RankGrid
    dtype: torch.dtype

    @property
    def multiple(self) -> int:
        """What the rows of the vocabulary are padded to a multiple of."""
        return VOCABULARY_MULTIPLE * self.grid.tensor

    @cached_property
    def tensors(self) -> TensorView:
        """What is written, over all ranks and under Megatron's names."""
        return TensorView(self.source, self.architecture, self.multiple)

    @property
    def arguments(self) -> Mapping[str, object]:
        """Megatron's, those that say what the model computes."""
        rows = self.source.model.vocab_size
        return {
            **self.architecture.write_config(self.source.model),
            "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
            "padded_vocab_size": -(-rows // self.multiple) * self.multiple,
            "params_dtype": self.dtype,
            "bf16": self.dtype is torch.bfloat16,
            "fp16": self.dtype is torch.float16,
        }


def widest_dtype(weights: WeightSource) -> torch.dtype:
    """The dtype that holds all weights as they are stored: Megatron has one for a model."""
    return functools.reduce(torch.promote_types, map(weights.dtype, weights.names))


def export_bytes_for_megatron(export: MegatronExport) -> int:
    """Bytes of all weights, those that several ranks hold counted once."""
    tensors = export.tensors
    return sum(map(tensors.size, tensors.shapes)) * export.dtype.itemsize


def write_megatron(
    export: MegatronExport,
    target: Path,
    accept: Callable[[Path], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the directory `target`; `accept` and errors are as in `write_new_directory`, and
    ConversionError or CheckpointError where the model can't be cut for those ranks."""
    _check_tensor_size(export)
    tensors = export.tensors

    def write(folder: Path) -> None:
        write_rank_directories(
            folder, tensors, export.grid, export.arguments, export.dtype, progress
        )

    needed = export_bytes_for_megatron(export) + export.grid.ranks * ALLOWANCE
    return write_new_directory(target, needed, write, accept=accept)


def _check_tensor_size(export: MegatronExport) -> None:
    """Raises ConversionError for a number of tensor-parallel ranks with which Megatron would not
    start, although the tensors can be cut."""
    config = ForeignConfig(export.arguments)
    heads, groups = config.count("num_attention_heads"), config.count("num_query_groups")
    width, inner = config.count("kv_channels"), config.count("ffn_hidden_size")
    usable = [
        ranks
        for ranks in range(1, heads + 1)
        if heads % ranks == inner % ranks == (heads + 2 * groups) * width % ranks == 0
        and (groups % ranks == 0 or ranks % groups == 0)
    ]
    if export.grid.tensor not in usable:
        *others, last = map(str, usable)
        raise ConversionError(
            f"--tensor {export.grid.tensor}: Megatron can't share "
            f"{counted(heads, 'attention head')} ({counted(groups, 'query group')}) and an MLP of "
            f"{inner:,} among that many ranks. Take "
            + (f"{', '.join(others)} or {last}." if others else f"{last}.")
        )
