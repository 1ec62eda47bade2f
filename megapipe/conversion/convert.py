"""`megapipe convert` behind its command line: a model from one stack's directory to another's.

The direction follows from what the source holds. The result gets its name when it is proven.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from megapipe.checkpoint.find import find_checkpoint
from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.checkpoint.save import save_weights
from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.steps import require_free
from megapipe.config import ModelConfig, dump_model
from megapipe.conversion.hugging_face.directory import (
    GENERATION,
    HuggingFaceDirectory,
    is_hugging_face,
    read_json,
)
from megapipe.conversion.hugging_face.model_card import model_card
from megapipe.conversion.hugging_face.reference import require_transformers, transformers_logits
from megapipe.conversion.hugging_face.write import (
    FILE_BYTES,
    Export,
    as_json,
    export_bytes,
    write_export,
)
from megapipe.conversion.open import (
    Families,
    find_architecture,
    kept_tokenizer,
    model_of,
    named_architectures,
    open_hugging_face,
)
from megapipe.conversion.proof import Proof, proof_sequences, prove
from megapipe.conversion.source import CheckpointWeights, WeightSource
from megapipe.conversion.tokenizer import export_tokenizer
from megapipe.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megapipe.errors import ConversionError, DataError
from megapipe.files import shown
from megapipe.layout.architecture import Architecture
from megapipe.layout.family import ModelFamily

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json that are always written: absent, they would be other tokens' by default."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A progress bar: (what is done, bytes in all) -> what is told each number of bytes done."""


@dataclass(frozen=True)
class Conversion:
    """What a user has asked for.

    architecture: the other stack's name for the result; None: the one that fits. dtype: of the
    weights; None: as they are stored. proof: whether the result is compared with the other stack's
    own implementation, over `proof_layers` layers (None: all) and sequences of `proof_tokens`
    tokens. tokenizer: whether one is expected.
    """

    source: Path
    target: Path
    architecture: str | None = None
    dtype: torch.dtype | None = None
    proof: bool = True
    proof_layers: int | None = None
    proof_tokens: int | None = None
    tokenizer: bool = True
    allow_tokenizer_drift: bool = False
    file_bytes: int = FILE_BYTES


def convert(asked: Conversion, families: Families, say: Callable[[str], None], bar: Bar) -> None:
    """Write `asked.target`. `say` takes lines for people.

    Raises ConversionError, CheckpointError or DataError for what can't be converted or is not
    proven; then nothing is there.
    """
    require_free(asked.target)
    if asked.proof:
        require_transformers()
    if is_hugging_face(asked.source):
        _import(asked, families, say, bar)
    else:
        _export(asked, families, say, bar)


def _import(asked: Conversion, families: Families, say: Callable[[str], None], bar: Bar) -> None:
    """From a Hugging Face directory to a checkpoint of weights alone."""
    if asked.architecture is not None:
        raise ConversionError(
            f"--to {asked.architecture} is for conversions to other stacks; "
            f"{shown(asked.source)} is a model of Hugging Face's, which becomes a checkpoint"
        )
    directory = HuggingFaceDirectory(asked.source)
    family, architecture = find_architecture(directory, families)
    weights = open_hugging_face(directory, families)
    tokenizer = _tokenizer_of(asked, weights.model)
    say(f"{directory.place}: {architecture.name}, {_amounts(weights)}")
    files: dict[str, bytes | Path] = dict(tokenizer.files) if tokenizer else {}
    files[GENERATION] = as_json(_read_generation_config(directory))
    shards = [_shard(weights, name, asked.dtype) for name in weights.names]

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
    say(f"Written: {shown(asked.target)}")


def _export(asked: Conversion, families: Families, say: Callable[[str], None], bar: Bar) -> None:
    """From a checkpoint to a Hugging Face directory."""
    reader = open_checkpoint(find_checkpoint(asked.source))
    export, family, tokenizer = plan_export(
        reader,
        families,
        architecture=asked.architecture,
        dtype=asked.dtype,
        tokenizer=asked.tokenizer,
        allow_tokenizer_drift=asked.allow_tokenizer_drift,
        file_bytes=asked.file_bytes,
        say=say,
    )
    say(f"{export.source.place}: {export.architecture.name}, {_amounts(export.source)}")

    def accept(folder: Path) -> None:
        _prove(asked, family, export.source, folder, tokenizer, say)

    with bar("converting", export_bytes(export)) as progress:
        write_export(export, asked.target, progress=progress, accept=accept)
    say(f"Written: {shown(asked.target)}")


def plan_export(
    reader: CheckpointReader,
    families: Families,
    *,
    say: Callable[[str], None],
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: bool = True,
    allow_tokenizer_drift: bool = False,
    file_bytes: int = FILE_BYTES,
) -> tuple[Export, ModelFamily, Tokenizer | None]:
    """What a checkpoint becomes as a Hugging Face directory; the arguments are as in `Conversion`.

    Raises ConversionError where no architecture can hold its model, or its tokenizer is missing.
    """
    model = model_of(reader, families)
    family = families[model.family]
    chosen = choose_architecture(reader, family, model, architecture)
    kept = kept_tokenizer(reader) if tokenizer else None
    if tokenizer and kept is None:
        raise ConversionError(
            f"{shown(reader.path)} holds no tokenizer, and its users will need one. Convert "
            "without: --no-tokenizer."
        )
    generation = _generation_config(reader, kept)
    parts = []
    if kept is not None:

        def write_tokenizer(folder: Path) -> None:
            report = export_tokenizer(
                kept,
                folder,
                allow_drift=allow_tokenizer_drift,
                max_length=model.max_sequence_length,
            )
            say(str(report))

        parts.append(write_tokenizer)
    export = Export(
        CheckpointWeights(reader, model),
        chosen,
        dtype,
        config={key: generation.get(key) for key in SPECIAL_TOKENS},
        files={GENERATION: as_json(generation), "README.md": model_card(reader, chosen).encode()},
        parts=parts,
        file_bytes=file_bytes,
    )
    return export, family, kept


def choose_architecture(
    reader: CheckpointReader, family: ModelFamily, model: ModelConfig, name: str | None
) -> Architecture:
    """The architecture of that name, or else the one that the weights came from if the model is
    still one, or else the first that can hold it.

    Raises ConversionError that says why none can.
    """
    known = dict(named_architectures({family.name: family}, "hugging_face"))
    if name is not None:
        if name not in known:
            raise ConversionError(
                f"--to {shown(name)} is no architecture of models like this one; there are "
                f"{', '.join(known) or 'none'}"
            )
        known[name][1].write_config(model)  # or it says what does not fit
        return known[name][1]
    origin = reader.state.get("origin")
    first = origin.get("architecture") if isinstance(origin, dict) else None
    reasons = []
    for one in sorted(known, key=lambda other: other != first):
        try:
            known[one][1].write_config(model)
        except ConversionError as error:
            reasons.append(str(error))
        else:
            return known[one][1]
    raise ConversionError(
        "\n".join([f"{shown(reader.path)}: no other stack has such a model.", *reasons])
    )


def _generation_config(reader: CheckpointReader, tokenizer: Tokenizer | None) -> dict[str, object]:
    """That of the model that the weights came from, or one with the end token of documents."""
    if GENERATION in reader.files:
        return read_json(reader.path, GENERATION)
    if tokenizer is None:
        return {}
    return {"eos_token_id": tokenizer.end_of_document}


def _tokenizer_of(asked: Conversion, model: ModelConfig) -> Tokenizer | None:
    if not asked.tokenizer:
        return None
    try:
        tokenizer = load_tokenizer(asked.source, key=None)
        check_vocabulary(tokenizer, model.vocab_size)
    except DataError as error:
        raise ConversionError(
            f"{error} Or convert the weights without a tokenizer: --no-tokenizer."
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
    say: Callable[[str], None],
) -> None:
    if not asked.proof:
        say("Not proven: --no-proof.")
        return
    sequences = proof_sequences(ours.model, tokenizer, asked.proof_tokens)
    proof: Proof = prove(
        family,
        ours,
        lambda given, layers: transformers_logits(theirs, given, layers),
        sequences,
        asked.proof_layers,
    )
    say(f"Proven: {proof}")


def _amounts(weights: WeightSource) -> str:
    values = sum(torch.Size(weights.shape(name)).numel() for name in weights.names)
    return f"{values:,} parameters in {len(weights.names):,} tensors"
