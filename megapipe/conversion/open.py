"""Opening a model wherever it comes from, by what its directory holds."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from megapipe.amounts import counted
from megapipe.checkpoint.find import find_checkpoint
from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.config import ModelConfig, family_of
from megapipe.config.problems import show
from megapipe.conversion.hugging_face.directory import HuggingFaceDirectory, is_hugging_face
from megapipe.conversion.megatron.directory import (
    MegatronCheckpoint,
    is_megatron,
    open_megatron,
)
from megapipe.conversion.source import (
    CheckpointWeights,
    ForeignWeights,
    TensorStore,
    WeightSource,
)
from megapipe.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from megapipe.errors import CheckpointError, ConfigError, ConversionError
from megapipe.files import shown
from megapipe.layout.architecture import Architecture, Stack
from megapipe.layout.family import ModelFamily
from megapipe.tensor_parallel.parameter import sharded_parameters

Families = Mapping[str, ModelFamily]


def open_weights(path: Path, families: Families) -> WeightSource:
    """The weights of a Hugging Face directory, of a Megatron checkpoint, of a checkpoint of ours,
    or of a run's newest one.

    Raises CheckpointError or ConversionError where there are none, or none that we compute.
    """
    if is_hugging_face(path):
        return open_hugging_face(HuggingFaceDirectory(path), families)
    if is_megatron(path):
        return open_megatron_weights(open_megatron(path), families, {})
    reader = open_checkpoint(find_checkpoint(path))
    return CheckpointWeights(reader, model_of(reader, families))


def open_hugging_face(directory: HuggingFaceDirectory, families: Families) -> ForeignWeights:
    """The weights of a Hugging Face directory under our names."""
    family, architecture = find_architecture(directory, families)
    place = f"{directory.place}/config.json"
    try:
        model = architecture.read_config(directory.config)
    except ConversionError as error:
        raise ConversionError(f"{place}: {error}") from error
    return _foreign_weights(directory, family, architecture, model, place)


def _foreign_weights(
    store: TensorStore,
    family: ModelFamily,
    architecture: Architecture,
    model: ModelConfig,
    place: str,
) -> ForeignWeights:
    """The weights of `store`. Raises ConversionError where the config, which lies at `place`, can't
    be that of a model, or of this one."""
    problems = list(model.problems())
    if problems:
        key, text = problems[0].key, problems[0].text
        raise ConversionError(f"{place} contradicts itself: {key} {text}")
    if model.num_layers > len(store.tensors):  # before there is a table of so many
        raise ConversionError(
            f"{place} says that there are {model.num_layers:,} layers, and {store.place} holds "
            f"{counted(len(store.tensors), 'tensor')}"
        )
    return ForeignWeights(store, architecture, model, family.parameters(model))


def open_megatron_weights(
    checkpoint: MegatronCheckpoint, families: Families, arguments: Mapping[str, object]
) -> ForeignWeights:
    """The weights of a Megatron checkpoint under our names. `arguments` are Megatron's that the
    checkpoint does not hold.

    Raises ConversionError where one says something else than the checkpoint.
    """
    family, architecture = megatron_architecture(families)
    for name, value in arguments.items():
        held = checkpoint.arguments.get(name)
        if held is not None and held != value:
            raise ConversionError(
                f"--argument {name}={value}: {checkpoint.place} says {name} = {show(held)}. Leave "
                "it out."
            )
    try:
        model = architecture.read_config({**checkpoint.arguments, **arguments})
    except ConversionError as error:
        raise ConversionError(
            f"{checkpoint.place}: of Megatron's arguments, {error}\n  What the checkpoint does not "
            "hold is given as --argument NAME=VALUE."
        ) from error
    place = f"{checkpoint.place}: what Megatron's arguments say"
    return _foreign_weights(checkpoint, family, architecture, model, place)


def megatron_architecture(families: Families) -> tuple[ModelFamily, Architecture]:
    """The architecture of Megatron's models, and the family that it is of."""
    ((_, found), *_) = named_architectures(families, "megatron")
    return found


def find_architecture(
    directory: HuggingFaceDirectory, families: Families
) -> tuple[ModelFamily, Architecture]:
    """What a Hugging Face directory holds, and the family that it is of.

    By `architectures` of its config, else by `model_type`. Raises ConversionError where it is
    nothing that we compute.
    """
    known = dict(named_architectures(families, "hugging_face"))
    name, kind = directory.architecture, directory.model_type
    if name in known:
        return known[name]
    if name is None:
        for family, architecture in known.values():
            if kind is not None and architecture.model_type == kind:
                return family, architecture
    raise ConversionError(
        f"{directory.place}/config.json: architectures = "
        f"{shown(str(directory.config.get('architectures')))[:100]} (model_type = "
        f"{shown(str(kind))[:60]}) is not computed here; there are {', '.join(known)}."
    )


def named_architectures(
    families: Families, stack: Stack
) -> Iterator[tuple[str, tuple[ModelFamily, Architecture]]]:
    """The architectures of a stack by their names, each with the family that it is of."""
    for family in families.values():
        for architecture in family.architectures:
            if architecture.stack == stack:
                yield architecture.name, (family, architecture)


def model_of(reader: CheckpointReader, families: Families) -> ModelConfig:
    """The shape of the model of a checkpoint.

    Raises CheckpointError where there is no such family here.
    """
    values = reader.config["model"]
    try:
        model = family_of(values, families).config.model_validate(values)
    except ConfigError as error:
        raise CheckpointError(f"{reader.path}: {error}") from error
    if model.num_layers > len(reader.names):
        raise CheckpointError(
            f"{reader.path} has {model.num_layers:,} layers by its config.toml, and "
            f"{counted(len(reader.names), 'tensor')}"
        )
    return model


def kept_tokenizer(reader: CheckpointReader) -> Tokenizer | None:
    """The tokenizer that a checkpoint keeps, wherever the run's own has gone; None where it keeps
    none. Raises CheckpointError where a byte of it is damaged."""
    name = next((name for name in TOKENIZER_FILES if name in reader.files), None)
    if name is None:
        return None
    for file in reader.files:
        reader.read_file(file)  # verifies it
    return load_tokenizer(reader.path / name, key=None)


def fill(module: nn.Module, source: WeightSource) -> None:
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
