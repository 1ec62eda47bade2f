"""The shape of a model wherever it lies, from its config alone. Importing this imports no torch."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megapipe.checkpoint.steps import committed, has_manifest, refuse_exports
from megapipe.checkpoint.storage import read_small
from megapipe.config import ModelConfig, family_of
from megapipe.config.paths import HUB
from megapipe.config.problems import nearest, show
from megapipe.config.source import BEYOND_PYTHON
from megapipe.conversion.hugging_face.config_file import HuggingFaceConfig
from megapipe.conversion.kind import kind_of
from megapipe.errors import CheckpointError, ConfigError, ConversionError, MegapipeError
from megapipe.files import reason, shown
from megapipe.layout.architecture import Architecture, Stack
from megapipe.layout.family import ModelFamily
from megapipe.layout.foreign_config import MOST_LAYERS

if TYPE_CHECKING:
    from megapipe.conversion.megatron.directory import MegatronCheckpoint

Families = Mapping[str, ModelFamily]

MAX_CONFIG_BYTES = 2**20


def lend_model(load_from: Path, run_dir: Path | None, families: Families) -> ModelConfig:
    """The model of `checkpoint.load_from`; once the run directory has checkpoints, of the newest
    of those, from which the run goes on.

    Raises CheckpointError or ConversionError as `model_at` does.
    """
    if run_dir is not None:
        for path in committed(run_dir / "checkpoints").values():
            try:
                return _in_checkpoint(path, families)
            except MegapipeError:
                continue  # damaged, as the start will say
    return model_at(load_from, families)


def model_at(path: Path, families: Families) -> ModelConfig:
    """The model of a Hugging Face directory, of a checkpoint, or of a run's newest checkpoint; of
    a checkpoint of Megatron's, for which torch is imported.

    Raises CheckpointError or ConversionError where there is none, or none that we compute.
    """
    try:
        return _model_at(path, families)
    except OSError as error:
        raise CheckpointError(f"{shown(path)} can't be read: {reason(error)}") from error


def _model_at(path: Path, families: Families) -> ModelConfig:
    refuse_hub_name(path)
    if not path.is_dir():
        raise CheckpointError(f"{shown(path)}: there is no such directory")
    kind = kind_of(path)
    if kind == "hugging_face":
        config = HuggingFaceConfig(path)
        return hugging_face_model(config, find_architecture(config, families)[1])
    if kind == "checkpoint":
        return _in_checkpoint(path, families)
    if kind == "megatron":
        from megapipe.conversion.megatron.directory import open_megatron  # imports torch

        return megatron_model(open_megatron(path), megatron_architecture(families)[1], {})
    for root in (path / "checkpoints", path):
        newest = next(iter(committed(root).values()), None)
        if newest is not None:
            return _in_checkpoint(newest, families)
    raise CheckpointError(
        f"{shown(path)} holds no model: neither a config.json of Hugging Face's, nor a checkpoint "
        "of ours or of Megatron's, nor is it a run with a checkpoint"
    )


def refuse_hub_name(path: Path) -> None:
    """Raises ConversionError where a path that does not exist may be the name of a model on the
    hub: hf://..., or OWNER/NAME where there is no directory OWNER."""
    marked, name = str(path).startswith("hf:/"), str(path).removeprefix("hf:/")
    if path.exists() or not (marked or (name.count("/") == 1 and not path.parent.exists())):
        return
    raise ConversionError(
        f"{HUB if marked else ''}{shown(name)} does not exist here. A model of the Hugging Face "
        f"hub is downloaded first (`hf download {shown(name)} --local-dir DIR`), and then DIR is "
        "named."
    )


def described_model(config: Mapping[str, Any], place: str, families: Families) -> ModelConfig:
    """The model of the config that a checkpoint keeps.

    Raises CheckpointError where there is no such family here, or it has other keys.
    """
    values = config.get("model")
    try:
        if not isinstance(values, dict):
            raise ConfigError(["has no section [model]"])
        model = family_of(values, families).config.model_validate(values)
        if model.num_layers > MOST_LAYERS:
            raise ConfigError([f"has {model.num_layers:,} layers, more than {MOST_LAYERS:,}"])
        return model
    except ConfigError as error:
        raise CheckpointError(f"{place}: {error}") from error
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False)
        key = ".".join(["model", *map(str, first["loc"])])
        raise CheckpointError(f"{place}: {key}: {first['msg']}") from error


def hugging_face_model(directory: HuggingFaceConfig, architecture: Architecture) -> ModelConfig:
    """Our [model] for the config of a Hugging Face directory.

    Raises ConversionError where it asks for what we don't compute, or contradicts itself.
    """
    place = f"{directory.place}/config.json"
    try:
        model = architecture.read_config(directory.config)
    except ConversionError as error:
        raise ConversionError(f"{place}: {error}") from error
    return _consistent(model, place)


def _consistent(model: ModelConfig, place: str) -> ModelConfig:
    problems = list(model.problems())
    if problems:
        key, text = problems[0].key, problems[0].text
        raise ConversionError(f"{place} contradicts itself: {key} {text}")
    return model


def find_architecture(
    directory: HuggingFaceConfig, families: Families
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
        f"{shown(str(kind))[:60]}) is not supported; supported are {', '.join(known)}."
    )


def named_architectures(
    families: Families, stack: Stack
) -> Iterator[tuple[str, tuple[ModelFamily, Architecture]]]:
    """The architectures of a stack by their names, each with the family that it is of."""
    for family in families.values():
        for architecture in family.architectures:
            if architecture.stack == stack:
                yield architecture.name, (family, architecture)


class _Watched(Mapping[str, object]):
    """Values, and the names that somebody has looked up."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        self.looked_up: set[str] = set()

    def __getitem__(self, name: str) -> object:
        self.looked_up.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def megatron_model(
    checkpoint: "MegatronCheckpoint", architecture: Architecture, arguments: Mapping[str, object]
) -> ModelConfig:
    """Our [model] for the arguments of Megatron's that a checkpoint holds, and `arguments`, which
    it does not hold.

    Raises ConversionError where one says something else than the checkpoint or nothing of a model,
    or they ask for what we don't compute.
    """
    for name, value in arguments.items():
        held = checkpoint.arguments.get(name)
        if held is not None and held != value:
            raise ConversionError(
                f"--argument {name} = {show(value)}: {checkpoint.place} says {name} = "
                f"{show(held)}. Leave it out."
            )
    values = _Watched({**checkpoint.arguments, **arguments})
    try:
        model = architecture.read_config(values)
    except ConversionError as error:
        raise ConversionError(
            f"{checkpoint.place}: of Megatron's arguments, {error}\n  What the checkpoint does not "
            "hold is given to `megapipe convert` as --argument NAME=VALUE."
        ) from error
    known = values.looked_up | architecture.write_config(model).keys()
    for name in arguments:
        if name not in known and name not in checkpoint.arguments:
            close = nearest(name, sorted(known))
            raise ConversionError(
                f"--argument {name} says nothing of what a model computes. "
                + (f"Did you mean {close}?" if close else "Leave it out.")
            )
    return _consistent(model, f"{checkpoint.place}: what Megatron's arguments say")


def megatron_architecture(families: Families) -> tuple[ModelFamily, Architecture]:
    """The architecture of Megatron's models, and the family that it is of. Raises ConversionError
    where none of the families has one."""
    for _, found in named_architectures(families, "megatron"):
        return found
    raise ConversionError(f"Megatron has no models like those of family {', '.join(families)}")


def _in_checkpoint(path: Path, families: Families) -> ModelConfig:
    if not has_manifest(path):
        refuse_exports(path.parent)
    place = shown(path / "config.toml")
    try:
        text = read_small(path / "config.toml", MAX_CONFIG_BYTES).decode()
        return described_model(tomllib.loads(text), place, families)
    except BEYOND_PYTHON as error:
        raise CheckpointError(f"{place} is damaged: {error}") from error
