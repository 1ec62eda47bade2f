"""The unit that flows through the pipeline."""

from dataclasses import dataclass

from torch import Tensor

IGNORED_TARGET = -100
"""A target with this value adds neither to the loss nor to the number of tokens."""


@dataclass(frozen=True)
class MicroBatch:
    """B sequences of S tokens, as far as this rank needs to know them.

    `tokens_BS` is there on ranks that hold the first stage, `targets_BS` on ranks that hold the
    last. `documents_BS` numbers the documents within each sequence and reaches every stage where
    attention must not cross documents; else it is None. `samples_B` are global sample indices:
    with them dropout draws the same bits in every layout. `sources_BS`, int32, says which source of
    the data each target comes from, by its place in the config. It is there on ranks that hold the
    last stage where losses by source are wanted.
    """

    tokens_BS: Tensor | None
    targets_BS: Tensor | None
    documents_BS: Tensor | None
    samples_B: Tensor
    sources_BS: Tensor | None = None
