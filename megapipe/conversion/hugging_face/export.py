"""What a checkpoint becomes as a directory of Hugging Face's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megapipe.checkpoint.load import CheckpointReader
from megapipe.config import ModelConfig
from megapipe.conversion.hugging_face.choice import choose_architecture, unwritten_notes
from megapipe.conversion.hugging_face.config_file import GENERATION, read_json
from megapipe.conversion.hugging_face.model_card import model_card
from megapipe.conversion.hugging_face.write import FILE_BYTES, Export, as_json
from megapipe.conversion.model_at import Families
from megapipe.conversion.open import checkpoint_weights, kept_tokenizer
from megapipe.conversion.origin import saved_origin
from megapipe.conversion.tokenizer import export_tokenizer
from megapipe.data.tokenizer import Tokenizer
from megapipe.errors import ConversionError
from megapipe.files import shown
from megapipe.layout.architecture import Architecture
from megapipe.layout.family import ModelFamily
from megapipe.precision import PRECISIONS

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json that are always written: absent, they would be other tokens' by default."""


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose.

    architecture: Hugging Face's name for the model; None: what it was there, or the first that can
    hold it. dtype: of the weights; None: what the run computed with, for weights alone as they are
    stored. tokenizer: whether one is expected.
    """

    architecture: str | None = None
    dtype: torch.dtype | None = None
    tokenizer: bool = True
    allow_tokenizer_drift: bool = False
    file_bytes: int = FILE_BYTES


@dataclass(frozen=True)
class PlannedExport:
    """An export, with the family of its model and its tokenizer. `notes` are lines for people on
    what it leaves out."""

    export: Export
    family: ModelFamily
    tokenizer: Tokenizer | None
    notes: Sequence[str]


def plan_export(
    reader: CheckpointReader,
    families: Families,
    options: ExportOptions,
    say: Callable[[str], None],
    tokenizer: Tokenizer | None = None,
) -> PlannedExport:
    """The export of a checkpoint, with its own tokenizer unless another is given. `say` takes lines
    for people while it is written.

    Raises ConversionError where no architecture can hold the model, or its tokenizer is missing.
    """
    weights = checkpoint_weights(reader, families)
    model = weights.model
    family = families[model.family]
    architecture = _choose(reader, family, model, options.architecture)
    if options.tokenizer and tokenizer is None:
        tokenizer = kept_tokenizer(reader)
    if options.tokenizer and tokenizer is None:
        raise ConversionError(
            f"{shown(reader.path)} holds no tokenizer, and users of the model need one. Name it "
            "(--tokenizer PATH), or convert without: --no-tokenizer."
        )
    parts: list[Callable[[Path], object]] = []
    if tokenizer is not None:
        parts.append(_tokenizer_writer(tokenizer, model, architecture, options, say))
    generation = _generation_config(reader, tokenizer)
    export = Export(
        weights,
        architecture,
        options.dtype or dtype_of_run(reader),
        config={key: generation.get(key) for key in SPECIAL_TOKENS},
        files={
            GENERATION: as_json(generation),
            "README.md": model_card(reader, architecture).encode(),
        },
        parts=parts,
        file_bytes=options.file_bytes,
    )
    return PlannedExport(export, family, tokenizer, unwritten_notes(architecture, model))


def _choose(
    reader: CheckpointReader, family: ModelFamily, model: ModelConfig, name: str | None
) -> Architecture:
    """The architecture of that name, or else the one that the weights came from if the model is
    still one, or else the first that can hold it. Raises ConversionError that says why none can."""
    first = (saved_origin(reader.state) or {}).get("architecture")
    return choose_architecture(family, model, name, first, place=shown(reader.path))


def _tokenizer_writer(
    tokenizer: Tokenizer,
    model: ModelConfig,
    architecture: Architecture,
    options: ExportOptions,
    say: Callable[[str], None],
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        report = export_tokenizer(
            tokenizer,
            folder,
            allow_drift=options.allow_tokenizer_drift,
            max_length=model.max_sequence_length,
            model_type=architecture.model_type,
        )
        say(str(report))

    return write


def dtype_of_run(reader: CheckpointReader) -> torch.dtype | None:
    """What a run computed with; None for weights alone, which stay as they are."""
    if reader.step is None:
        return None
    return PRECISIONS[reader.config["train"]["precision"]].model_dtype


def _generation_config(reader: CheckpointReader, tokenizer: Tokenizer | None) -> dict[str, object]:
    """That of the model that the weights came from, or one with the end token of documents."""
    if GENERATION in reader.files:
        reader.read_file(GENERATION)  # verifies it
        return read_json(reader.path, GENERATION)
    return {} if tokenizer is None else {"eos_token_id": tokenizer.end_of_document}
