"""Whether the exports that a run is to make can be made, before it begins. No torch."""

import tempfile
from pathlib import Path

from megapipe.checkpoint.steps import committed
from megapipe.config import Config
from megapipe.conversion.hugging_face.choice import choose_architecture, unwritten_notes
from megapipe.conversion.model_at import Families
from megapipe.conversion.origin import origin_at
from megapipe.conversion.tokenizer import ALLOW_DRIFT, TokenizerDriftError, export_tokenizer
from megapipe.data.tokenizer import load_tokenizer
from megapipe.errors import ConversionError, DataError, MegapipeError
from megapipe.layout.architecture import Architecture

WITHOUT = "To train without exports: checkpoint.export_every = 0."
LATER = (
    "Train without exports (checkpoint.export_every = 0), or with another data.tokenizer. "
    f"Checkpoints can be exported later: `megapipe convert CHECKPOINT DST {ALLOW_DRIFT}`."
)


def check_exports(
    config: Config, families: Families, *, without_tokenizer: bool = False
) -> list[str]:
    """Lines for people on the exports that checkpoint.export_every asks for.

    Raises ConversionError where the model or the tokenizer can't be exported, DataError where the
    tokenizer can't be read; with `without_tokenizer`, as in a dry run, that is a line too.
    """
    every = config.checkpoint.export_every
    if every == 0:
        return []
    place = f"checkpoint.export_every = {every}"
    family = families[config.model.family]
    first = _first_architecture(config, families)
    architecture = choose_architecture(family, config.model, first=first, place=place)
    notes = unwritten_notes(architecture, config.model)
    try:
        _check_tokenizer(config, architecture)
    except DataError as error:
        if not without_tokenizer:
            raise
        notes.append(f"Whether the tokenizer can be exported is seen at the start: {error}")
    except TokenizerDriftError as error:
        raise ConversionError(f"{place}: {error.advised(LATER)}") from error
    except ConversionError as error:
        raise ConversionError(f"{place}: {error}\n{WITHOUT}") from error
    return notes


def _check_tokenizer(config: Config, architecture: Architecture) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        export_tokenizer(
            tokenizer,
            Path(folder),
            allow_drift=False,
            max_length=config.model.max_sequence_length,
            model_type=architecture.model_type,
        )


def _first_architecture(config: Config, families: Families) -> object:
    """What the model is exported as if it can be: what it was before it came here."""
    settings, run_dir = config.checkpoint, Path(config.train.run_dir)
    place: Path | None = None
    if committed(run_dir / "checkpoints"):
        place = run_dir
    elif settings.resume not in ("auto", "never"):
        place = Path(settings.resume)
    elif settings.load_from is not None and "weights" in settings.load_state:
        place = Path(settings.load_from)
    try:
        origin = origin_at(place, families) if place is not None else None
    except MegapipeError:  # as the start will say
        return None
    return (origin or {}).get("architecture")
