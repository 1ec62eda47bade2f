"""`megapipe convert` behind its command line: a model from one stack's directory to another's.

The direction follows from what the source holds. The result gets its name when it is proven.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megapipe.checkpoint.find import find_checkpoint
from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.save import save_weights
from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.steps import require_free
from megapipe.config import ModelConfig, dump_model
from megapipe.conversion.hugging_face.config_file import GENERATION, is_hugging_face, read_json
from megapipe.conversion.hugging_face.directory import HuggingFaceDirectory
from megapipe.conversion.hugging_face.export import SPECIAL_TOKENS, ExportOptions, plan_export
from megapipe.conversion.hugging_face.reference import require_transformers, transformers_logits
from megapipe.conversion.hugging_face.write import as_json, export_bytes, write_export
from megapipe.conversion.model_at import Families, find_architecture
from megapipe.conversion.open import open_hugging_face
from megapipe.conversion.proof import proof_sequences, prove
from megapipe.conversion.source import CheckpointWeights, WeightSource
from megapipe.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megapipe.errors import ConversionError, DataError
from megapipe.files import shown
from megapipe.layout.family import ModelFamily

Say = Callable[[str], None]
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A progress bar: (what is done, bytes in all) -> what is called with each number of bytes."""


@dataclass(frozen=True)
class ProofOptions:
    """Whether and how a result is compared with the other stack's own implementation: over the
    first `layers` of the model (None: all), with sequences of `tokens` tokens (None: as many as
    suit the model)."""

    wanted: bool = True
    layers: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Conversion:
    """What a user has asked for; `options` are for exports, and of imports those that apply."""

    source: Path
    target: Path
    options: ExportOptions = field(default_factory=ExportOptions)
    proof: ProofOptions = field(default_factory=ProofOptions)


def convert(asked: Conversion, families: Families, say: Say, bar: Bar) -> None:
    """Write `asked.target`. `say` takes lines for people.

    Raises ConversionError, CheckpointError or DataError for what can't be converted or is not
    proven; then nothing is there.
    """
    require_free(asked.target)
    if asked.proof.wanted:
        require_transformers()
    if is_hugging_face(asked.source):
        _import(asked, families, say, bar)
    else:
        _export(asked, families, say, bar)
    say(f"Written: {shown(asked.target)}")


def _import(asked: Conversion, families: Families, say: Say, bar: Bar) -> None:
    """From a Hugging Face directory to a checkpoint of weights alone."""
    options = asked.options
    if options.architecture is not None:
        raise ConversionError(
            f"--to {options.architecture} is for conversions to other stacks; "
            f"{shown(asked.source)} is a model of Hugging Face's, which becomes a checkpoint"
        )
    directory = HuggingFaceDirectory(asked.source)
    family, architecture = find_architecture(directory, families)
    weights = open_hugging_face(directory, families)
    tokenizer = _load_tokenizer(asked.source, weights.model) if options.tokenizer else None
    say(f"{weights.place}: {architecture.name}, {_amounts(weights)}")
    files: dict[str, bytes | Path] = dict(tokenizer.files) if tokenizer else {}
    files[GENERATION] = as_json(_generation_config(directory))
    shards = [_shard(weights, name, options.dtype) for name in weights.names]

    def accept(folder: Path) -> None:
        written = CheckpointWeights(open_checkpoint(folder), weights.model)
        _prove(asked, family, written, asked.source, tokenizer, say)

    with bar("converting", sum(shard.tensor.nbytes for shard in shards)) as progress:
        save_weights(
            asked.target,
            shards,
            model_toml=dump_model(weights.model).encode(),
            files=files,
            state={"origin": {"stack": "hugging_face", "architecture": architecture.name}},
            progress=progress,
            accept=accept,
        )


def _export(asked: Conversion, families: Families, say: Say, bar: Bar) -> None:
    """From a checkpoint to a Hugging Face directory."""
    reader = open_checkpoint(find_checkpoint(asked.source))
    planned = plan_export(reader, families, asked.options, say)
    export = planned.export
    say(f"{export.source.place}: {export.architecture.name}, {_amounts(export.source)}")

    def accept(folder: Path) -> None:
        _prove(asked, planned.family, export.source, folder, planned.tokenizer, say, export.dtype)

    with bar("converting", export_bytes(export)) as progress:
        write_export(export, asked.target, progress=progress, accept=accept)


def _generation_config(directory: HuggingFaceDirectory) -> dict[str, object]:
    """generation_config.json, with the special tokens of config.json that it does not name."""
    named = {key: directory.config[key] for key in SPECIAL_TOKENS if key in directory.config}
    if not (directory.path / GENERATION).exists():
        return named
    return {**named, **read_json(directory.path, GENERATION)}


def _load_tokenizer(source: Path, model: ModelConfig) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(source, key=None)
        check_vocabulary(tokenizer, model.vocab_size)
    except DataError as error:
        raise ConversionError(
            f"{error} To convert the weights without a tokenizer: --no-tokenizer."
        ) from error
    return tokenizer


def _shard(weights: WeightSource, name: str, dtype: torch.dtype | None) -> Shard:
    """A whole parameter, read when it is written."""
    shape, used = weights.shape(name), dtype or weights.dtype(name)
    return Shard(
        f"weights/{name}",
        shape,
        (0,) * len(shape),
        torch.empty(shape, dtype=used, device="meta"),
        load=lambda: weights.read(name, dtype=used),
    )


def _prove(
    asked: Conversion,
    family: ModelFamily,
    ours: WeightSource,
    theirs: Path,
    tokenizer: Tokenizer | None,
    say: Say,
    dtype: torch.dtype | None = None,
) -> None:
    """Compare our logits with those of transformers; `dtype` is what ours are rounded to first."""
    if not asked.proof.wanted:
        say("Not proven: --no-proof.")
        return
    proof = prove(
        family,
        ours,
        lambda sequences, layers: transformers_logits(
            theirs, sequences, layers, rounded=asked.options.dtype
        ),
        proof_sequences(ours.model, tokenizer, asked.proof.tokens),
        layers=asked.proof.layers,
        rounded=dtype,
    )
    say(f"Proven: {proof}")


def _amounts(weights: WeightSource) -> str:
    values = sum(torch.Size(weights.shape(name)).numel() for name in weights.names)
    return f"{values:,} parameters in {len(weights.names):,} tensors"
