"""`megapipe convert` behind its command line: a model from one stack's directory to another's.

The direction follows from what the source holds. The result gets its name when it is proven.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from megapipe.checkpoint.find import find_checkpoint
from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.save import save_weights
from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.steps import require_free
from megapipe.config import dump_model
from megapipe.conversion.hugging_face.config_file import GENERATION
from megapipe.conversion.hugging_face.export import ExportOptions, dtype_of_run, plan_export
from megapipe.conversion.hugging_face.reference import require_transformers, transformers_logits
from megapipe.conversion.hugging_face.write import (
    FILE_BYTES,
    as_json,
    export_bytes,
    write_export,
)
from megapipe.conversion.incoming import open_incoming
from megapipe.conversion.kind import OTHER_STACKS, kind_of
from megapipe.conversion.megatron.export import (
    MegatronExport,
    export_bytes_for_megatron,
    widest_dtype,
    write_megatron,
)
from megapipe.conversion.megatron.reference import megatron_logits, require_megatron
from megapipe.conversion.megatron.writer import RankGrid
from megapipe.conversion.model_at import Families, megatron_architecture
from megapipe.conversion.open import checkpoint_weights, kept_tokenizer
from megapipe.conversion.places import check_target, new_parents_removed, require_model
from megapipe.conversion.proof import TheirLogits, check_proof, proof_sequences, prove
from megapipe.conversion.source import CheckpointWeights, WeightSource
from megapipe.data.tokenizer import Tokenizer, load_tokenizer
from megapipe.errors import ConversionError
from megapipe.files import shown
from megapipe.layout.family import ModelFamily

MEGATRON = "GPTModel"
"""The architecture that is written as directories for ranks."""
TO_OTHERS = "for conversions to other stacks"
TO_MEGATRON = f"for models that Megatron gets (--to {MEGATRON})"
TO_HUGGING_FACE = "for conversions to Hugging Face"

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
    """What a user has asked for; `options` are for exports, and of imports those that apply.

    arguments: Megatron's, those that its checkpoint does not hold. tokenizer: where the tokenizer
    is, if not in the source. grid: for how many of Megatron's ranks a model is written.
    """

    source: Path
    target: Path
    options: ExportOptions = field(default_factory=ExportOptions)
    proof: ProofOptions = field(default_factory=ProofOptions)
    arguments: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Path | None = None
    grid: RankGrid = field(default_factory=RankGrid)


def convert(asked: Conversion, families: Families, say: Say, bar: Bar) -> None:
    """Write `asked.target`. `say` takes lines for people.

    Raises ConversionError, CheckpointError or DataError for what can't be converted or is not
    proven; then nothing is there.
    """
    require_free(asked.target)
    require_model(asked.source)
    check_target(asked.source, asked.target)
    kind = kind_of(asked.source)
    incoming, from_megatron = kind in OTHER_STACKS, kind == "megatron"
    to_megatron = not incoming and asked.options.architecture == MEGATRON
    _refuse_options(asked, incoming=incoming, from_megatron=from_megatron, to_megatron=to_megatron)
    if asked.proof.wanted:
        require_megatron() if from_megatron or to_megatron else require_transformers()
    with new_parents_removed(asked.target):
        if incoming:
            _import(asked, families, say, bar)
        elif to_megatron:
            _export_to_megatron(asked, families, say, bar)
        else:
            _export(asked, families, say, bar)
    say(f"Written: {shown(asked.target)}, {_result(incoming, to_megatron)}")


def _refuse_options(
    asked: Conversion, *, incoming: bool, from_megatron: bool, to_megatron: bool
) -> None:
    """Raises ConversionError for options that mean nothing in a conversion of this direction."""
    options, to_hugging_face = asked.options, not incoming and not to_megatron
    for named, used, fits, where in (
        (f"--to {options.architecture}", options.architecture, not incoming, TO_OTHERS),
        ("--tensor, --pipeline or --virtual", asked.grid != RankGrid(), to_megatron, TO_MEGATRON),
        ("--file-size", options.file_bytes != FILE_BYTES, to_hugging_face, TO_HUGGING_FACE),
        (
            "--allow-tokenizer-drift",
            options.allow_tokenizer_drift,
            to_hugging_face,
            TO_HUGGING_FACE,
        ),
        ("--tokenizer", asked.tokenizer, not to_megatron, "not for Megatron, which keeps none"),
        ("--argument", asked.arguments, from_megatron, "for checkpoints of Megatron"),
    ):
        if used and not fits:
            result = _result(incoming, to_megatron)
            raise ConversionError(f"{named} is {where}; {shown(asked.source)} becomes {result}")


def _result(incoming: bool, to_megatron: bool) -> str:
    if incoming:
        return "a checkpoint of megapipe"
    return "a Megatron checkpoint" if to_megatron else "a Hugging Face directory"


def _import(asked: Conversion, families: Families, say: Say, bar: Bar) -> None:
    """From another stack's directory to a checkpoint of weights alone."""
    options = asked.options
    incoming = open_incoming(asked.source, asked.arguments, asked.tokenizer, families)
    weights = incoming.weights
    check_proof(weights.model, asked.proof.layers, asked.proof.tokens)
    tokenizer = incoming.load_tokenizer() if options.tokenizer else None
    say(f"{weights.place}: {incoming.architecture}, {_amounts(weights)}")
    for line in incoming.notes:
        say(line)
    files: dict[str, bytes | Path] = dict(tokenizer.files) if tokenizer else {}
    if incoming.generation:
        files[GENERATION] = as_json(incoming.generation)
    shards = [_shard(weights, name, options.dtype) for name in weights.names]
    origin = {
        "stack": incoming.stack,
        "architecture": incoming.architecture,
        "name": asked.source.absolute().name,
    }

    def accept(folder: Path) -> None:
        written = CheckpointWeights(open_checkpoint(folder), weights.model)
        logits = partial(incoming.logits, rounded=options.dtype)
        _prove(asked.proof, incoming.family, written, logits, tokenizer, say)

    with bar("converting", sum(shard.tensor.nbytes for shard in shards)) as progress:
        save_weights(
            asked.target,
            shards,
            model_toml=dump_model(weights.model).encode(),
            files=files,
            state={"origin": origin},
            progress=progress,
            accept=accept,
        )


def _export_to_megatron(asked: Conversion, families: Families, say: Say, bar: Bar) -> None:
    """From a checkpoint to Megatron-LM's directories for ranks."""
    reader = open_checkpoint(find_checkpoint(asked.source))
    weights = checkpoint_weights(reader, families)
    check_proof(weights.model, asked.proof.layers, asked.proof.tokens)
    family, architecture = megatron_architecture(
        {weights.model.family: families[weights.model.family]}
    )
    dtype = asked.options.dtype or dtype_of_run(reader) or widest_dtype(weights)
    export = MegatronExport(weights, architecture, asked.grid, dtype)
    say(f"{weights.place}: {architecture.name}, {_amounts(weights)}")

    def accept(folder: Path) -> None:
        logits = partial(megatron_logits, folder, {}, architecture.write_config(weights.model))
        tokenizer = kept_tokenizer(reader)
        _prove(asked.proof, family, weights, logits, tokenizer, say, rounded=dtype)

    with bar("converting", export_bytes_for_megatron(export)) as progress:
        write_megatron(export, asked.target, accept, progress)


def _export(asked: Conversion, families: Families, say: Say, bar: Bar) -> None:
    """From a checkpoint to a Hugging Face directory."""
    reader = open_checkpoint(find_checkpoint(asked.source))
    tokenizer = None if asked.tokenizer is None else load_tokenizer(asked.tokenizer, key=None)
    planned = plan_export(reader, families, asked.options, say, tokenizer)
    export = planned.export
    check_proof(export.source.model, asked.proof.layers, asked.proof.tokens)
    say(f"{export.source.place}: {export.architecture.name}, {_amounts(export.source)}")
    for line in planned.notes:
        say(line)

    def accept(folder: Path) -> None:
        logits = partial(transformers_logits, folder)
        _prove(
            asked.proof,
            planned.family,
            export.source,
            logits,
            planned.tokenizer,
            say,
            rounded=export.dtype,
        )

    with bar("converting", export_bytes(export)) as progress:
        write_export(export, asked.target, progress=progress, accept=accept)


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
    options: ProofOptions,
    family: ModelFamily,
    ours: WeightSource,
    theirs: TheirLogits,
    tokenizer: Tokenizer | None,
    say: Say,
    rounded: torch.dtype | None = None,
) -> None:
    if not options.wanted:
        say("Not proven: --no-proof.")
        return
    sequences = proof_sequences(ours.model, tokenizer, options.tokens)
    proof = prove(family, ours, theirs, sequences, layers=options.layers, rounded=rounded)
    say(f"Proven: {proof}")
    length, longest = max(map(len, sequences.values())), ours.model.max_sequence_length
    if ours.model.masks_attention(longest) and not ours.model.masks_attention(length):
        say(f"{length} tokens do not fill the model's window of attention: see --proof-tokens.")


def _amounts(weights: WeightSource) -> str:
    values = sum(torch.Size(weights.shape(name)).numel() for name in weights.names)
    return f"{values:,} parameters in {len(weights.names):,} tensors"
