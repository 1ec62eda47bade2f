"""A model of another stack on its way in: weights, tokenizer, and the other side of its proof."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megapipe.conversion.hugging_face.companions import check_companions
from megapipe.conversion.hugging_face.config_file import GENERATION, read_json
from megapipe.conversion.hugging_face.directory import HuggingFaceDirectory
from megapipe.conversion.hugging_face.export import SPECIAL_TOKENS
from megapipe.conversion.hugging_face.reference import transformers_logits
from megapipe.conversion.kind import kind_of
from megapipe.conversion.megatron.directory import open_megatron
from megapipe.conversion.megatron.reference import megatron_logits
from megapipe.conversion.model_at import Families, find_architecture, megatron_architecture
from megapipe.conversion.open import open_hugging_face, open_megatron_weights
from megapipe.conversion.proof import Sequences
from megapipe.conversion.source import WeightSource
from megapipe.data.tokenizer import Tokenizer, load_tokenizer
from megapipe.errors import ConversionError, DataError
from megapipe.files import shown
from megapipe.layout.architecture import Stack
from megapipe.layout.family import ModelFamily

WITHOUT_TOKENIZER = ", or name it: --tokenizer PATH; or convert the weights alone: --no-tokenizer"


class ReferenceLogits(Protocol):
    """Logits by the other stack, of weights rounded to a dtype first."""

    def __call__(
        self,
        sequences: Sequences,
        layers: int | None = None,
        rounded: torch.dtype | None = None,
    ) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Incoming:
    """A model of another stack, opened.

    `generation` is what generation_config.json says, with the special tokens of the model.
    `tokenizer` is where the tokenizer should be; None: nobody has said. `notes` are lines for
    people on what is left behind.
    """

    stack: Stack
    architecture: str
    family: ModelFamily
    weights: WeightSource
    logits: ReferenceLogits
    generation: Mapping[str, object]
    tokenizer: Path | None
    notes: Sequence[str] = ()

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ConversionError where there is none, or it does not fit."""
        if self.tokenizer is None:
            raise ConversionError(
                f"{self.weights.place} holds no tokenizer. Name it: --tokenizer PATH; or convert "
                "the weights alone: --no-tokenizer."
            )
        if kind_of(self.tokenizer) == "hugging_face":
            check_companions(self.tokenizer, WITHOUT_TOKENIZER)
        try:
            tokenizer = load_tokenizer(self.tokenizer, key=None)
        except DataError as error:
            raise ConversionError(
                f"{error} To convert the weights without a tokenizer: --no-tokenizer."
            ) from error
        size = self.weights.model.vocab_size
        if tokenizer.vocab_size > size:
            raise ConversionError(
                f"{shown(tokenizer.path)} numbers tokens up to {tokenizer.vocab_size - 1:,}, and "
                f"the model has only {size:,}, so they don't belong together. Name the model's "
                "own: --tokenizer PATH; or convert the weights alone: --no-tokenizer."
            )
        return tokenizer


def open_incoming(
    source: Path,
    arguments: Mapping[str, object],
    tokenizer: Path | None,
    families: Families,
) -> Incoming:
    """The model of a directory of another stack, by what the directory holds.

    `arguments` are Megatron's that its checkpoint does not hold. Raises CheckpointError or
    ConversionError for what can't be read or computed.
    """
    if kind_of(source) == "hugging_face":
        return _from_hugging_face(source, tokenizer, families)
    return _from_megatron(source, arguments, tokenizer, families)


def _from_hugging_face(source: Path, tokenizer: Path | None, families: Families) -> Incoming:
    directory = HuggingFaceDirectory(source)
    family, architecture = find_architecture(directory, families)
    named = {key: directory.config[key] for key in SPECIAL_TOKENS if key in directory.config}
    if (source / GENERATION).exists():
        named |= read_json(source, GENERATION)
    return Incoming(
        "hugging_face",
        architecture.name,
        family,
        open_hugging_face(directory, families),
        partial(transformers_logits, source),
        named,
        tokenizer or source,
    )


def _from_megatron(
    source: Path, arguments: Mapping[str, object], tokenizer: Path | None, families: Families
) -> Incoming:
    checkpoint = open_megatron(source)
    family, architecture = megatron_architecture(families)
    weights = open_megatron_weights(checkpoint, families, arguments)
    logits: Callable[..., Mapping[str, Tensor]] = partial(
        megatron_logits, checkpoint.path, arguments, architecture.write_config(weights.model)
    )
    notes = []
    if {**checkpoint.arguments, **arguments}.get("vocab_size") is None:
        notes.append(
            "Neither the checkpoint nor --argument says vocab_size, so the model keeps all "
            f"{weights.model.vocab_size:,} rows of the padded vocabulary. To leave the padding "
            "out: --argument vocab_size=N, the number of tokens of its tokenizer."
        )
    if checkpoint.optimizer is not None:
        taken = "a run starts with a new one"
        if checkpoint.state:
            taken = "a run whose checkpoint.load_from is the Megatron checkpoint itself can take it"
        notes.append(f"Optimizer state ({checkpoint.optimizer}) is left behind: {taken}.")
    return Incoming("megatron", architecture.name, family, weights, logits, {}, tokenizer, notes)
