"""As which of Hugging Face's architectures a model is exported. No torch."""

from collections.abc import Iterator

from megapipe.config import ModelConfig
from megapipe.config.problems import nearest, show
from megapipe.conversion.model_at import named_architectures
from megapipe.errors import ConversionError
from megapipe.files import shown
from megapipe.layout.architecture import Architecture, Stack
from megapipe.layout.family import ModelFamily

STACKS: tuple[Stack, ...] = ("hugging_face", "megatron")


def choose_architecture(
    family: ModelFamily,
    model: ModelConfig,
    name: str | None = None,
    first: object = None,
    *,
    place: str,
) -> Architecture:
    """The architecture `name`, or else `first` if it can hold the model, or else the first that
    can. Raises ConversionError that says why none can; `place` is where the model lies."""
    named = dict(named_architectures({family.name: family}, "hugging_face"))
    known = {key: architecture for key, (_, architecture) in named.items()}
    if name is not None and name not in known:
        raise ConversionError(_unknown(name, family))
    reasons = []
    for key in [name] if name else sorted(known, key=lambda other: other != first):
        try:
            known[key].write_config(model)
        except ConversionError as error:
            reasons.append(str(error))
        else:
            return known[key]
    if name is not None:
        usable = ", ".join(_that_can(family, model)) or "nothing else"
        raise ConversionError(f"{place}: {reasons[0]}\nWith --to it can become {usable}.")
    raise ConversionError("\n".join([f"{place}: Hugging Face has no such model:", *reasons]))


def _unknown(name: str, family: ModelFamily) -> str:
    """What is wrong with a name that no architecture has."""
    names = [
        key for stack in STACKS for key, _ in named_architectures({family.name: family}, stack)
    ]
    close = nearest(name, names)
    return (
        f"--to {shown(name)} is no architecture of models like this one; "
        + (f"did you mean {close}? There are " if close else "there are ")
        + (", ".join(names) or "none")
    )


def _that_can(family: ModelFamily, model: ModelConfig) -> Iterator[str]:
    """The names of the architectures that can hold a model, in all stacks."""
    for stack in STACKS:
        for name, (_, architecture) in named_architectures({family.name: family}, stack):
            try:
                architecture.write_config(model)
            except ConversionError:
                continue
            yield name


def unwritten_notes(architecture: Architecture, model: ModelConfig) -> list[str]:
    """A line on keys of [model] for which the architecture's config has no place. They say how to
    train the model, not what it computes: others are refused."""
    known = architecture.read_config(architecture.write_config(model))
    lost = [
        f"model.{key} = {show(getattr(model, key))}"
        for key in sorted(model.MAY_CHANGE - ModelConfig.MAY_CHANGE)
        if getattr(known, key) != getattr(model, key)
    ]
    if not lost:
        return []
    return [
        f"{architecture.name} has no place for {' and '.join(lost)}, which the export leaves out: "
        "say it again where the model is trained on."
    ]
