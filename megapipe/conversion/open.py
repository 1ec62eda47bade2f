"""Opening a model wherever it comes from, by what its directory holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from megapipe.checkpoint.find import find_checkpoint
from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.config import ModelConfig
from megapipe.config.problems import show
from megapipe.conversion.hugging_face.directory import HuggingFaceDirectory
from megapipe.conversion.kind import kind_of
from megapipe.conversion.megatron.directory import MegatronCheckpoint, open_megatron
from megapipe.conversion.model_at import (
    Families,
    described_model,
    find_architecture,
    hugging_face_model,
    megatron_architecture,
    megatron_model,
)
from megapipe.conversion.source import CheckpointWeights, ForeignWeights, WeightSource
from megapipe.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from megapipe.errors import CheckpointError, ConversionError
from megapipe.files import shown
from megapipe.tensor_parallel.parameter import sharded_parameters

MEGATRON_SHAPE = (
    "swiglu",
    "add_bias_linear",
    "add_qkv_bias",
    "normalization",
    "position_embedding_type",
    "untie_embeddings_and_output_weights",
    "group_query_attention",
    "num_query_groups",
    "qk_layernorm",
    "ffn_hidden_size",
    "kv_channels",
)
"""Megatron's arguments with defaults that decide which tensors a model has, and their shapes."""


def open_weights(path: Path, families: Families, allow: Sequence[str] = ()) -> WeightSource:
    """The weights of a Hugging Face directory, of a Megatron checkpoint, of a checkpoint of ours,
    or of a run's newest one. `allow` names what may be missing or left over in the first two, as
    `ForeignWeights` has it.

    Raises CheckpointError or ConversionError where there are none, or none that we compute.
    """
    kind = kind_of(path)
    if kind == "hugging_face":
        return open_hugging_face(HuggingFaceDirectory(path), families, allow)
    if kind == "megatron":
        return open_megatron_weights(open_megatron(path), families, {}, allow)
    reader = open_checkpoint(find_checkpoint(path))
    return CheckpointWeights(reader, model_of(reader, families))


def checkpoint_weights(reader: CheckpointReader, families: Families) -> CheckpointWeights:
    """The weights of a checkpoint of ours, all of them. Raises CheckpointError where they are not
    those of the model that its config.toml describes."""
    model = model_of(reader, families)
    parameters = families[model.family].parameters(model)
    reader.require({f"weights/{spec.name}": spec.shape for spec in parameters})
    return CheckpointWeights(reader, model)


def open_hugging_face(
    directory: HuggingFaceDirectory, families: Families, allow: Sequence[str] = ()
) -> ForeignWeights:
    """The weights of a Hugging Face directory under our names."""
    family, architecture = find_architecture(directory, families)
    model = hugging_face_model(directory, architecture)
    return ForeignWeights(directory, architecture, model, family.parameters(model), allow)


def open_megatron_weights(
    checkpoint: MegatronCheckpoint,
    families: Families,
    arguments: Mapping[str, object],
    allow: Sequence[str] = (),
) -> ForeignWeights:
    """The weights of a Megatron checkpoint under our names. `arguments` are Megatron's that the
    checkpoint does not hold.

    Raises ConversionError where one says something else than the checkpoint, or the tensors are
    others than the arguments say.
    """
    family, architecture = megatron_architecture(families)
    model = megatron_model(checkpoint, architecture, arguments)
    try:
        return ForeignWeights(checkpoint, architecture, model, family.parameters(model), allow)
    except ConversionError as error:
        held = {**checkpoint.arguments, **arguments}
        lines = [str(error), *_defaults(held, architecture.write_config(model))]
        raise ConversionError("\n".join(lines)) from error


def _defaults(held: Mapping[str, object], used: Mapping[str, object]) -> list[str]:
    """A line on Megatron's arguments that decide which tensors there are, and are nowhere."""
    names = [name for name in MEGATRON_SHAPE if held.get(name) is None]
    if not names:
        return []
    values = [f"{name}={show(used[name])}".replace('"', "") for name in names]
    return [
        "Neither the checkpoint nor --argument says these, so they are Megatron's defaults: "
        f"{', '.join(values)}. Pass the right values of those that differ to "
        "`megapipe convert` as --argument NAME=VALUE."
    ]


def model_of(reader: CheckpointReader, families: Families) -> ModelConfig:
    """The shape of the model of a checkpoint.

    Raises CheckpointError where there is no such family here.
    """
    return described_model(reader.config, shown(reader.path), families)


def kept_tokenizer(reader: CheckpointReader) -> Tokenizer | None:
    """The tokenizer that a checkpoint keeps, wherever the run's own has gone; None where it keeps
    none. Raises CheckpointError where a byte of it is damaged."""
    name = next((name for name in TOKENIZER_FILES if name in reader.files), None)
    if name is None:
        return None
    for file in reader.files:
        reader.read_file(file)  # verifies it
    return load_tokenizer(reader.path / name, key=None)


def load_weights(module: nn.Module, source: WeightSource) -> None:
    """Read every shard of every parameter. Raises CheckpointError where one is missing or has
    another shape."""
    parameters = list(sharded_parameters(module))
    for parameter in parameters:
        for shard in parameter.shards:
            if shard.name not in source.names:
                raise CheckpointError(f"{source.place} has no {shard.name}")
            if source.shape(shard.name) != shard.global_shape:
                raise CheckpointError(
                    f"{source.place}: {shard.name} has shape {list(source.shape(shard.name))} "
                    f"there, {list(shard.global_shape)} here"
                )
    for parameter in parameters:
        for shard in parameter.shards:
            values = source.read(shard.name, shard.start, shard.shape)
            shard.view(parameter.data).copy_(values)
