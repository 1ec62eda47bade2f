"""As which of Hugging Face's architectures a model is exported. No torch."""

from megapipe.config import ModelConfig
from megapipe.config.problems import nearest, show
from megapipe.conversion.model_at import named_architectures
from megapipe.errors import ConversionError
from megapipe.files import shown
from megapipe.layout.architecture import Architecture
from megapipe.layout.family import ModelFamily


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
    known = {
        key: architecture
        for key, (_, architecture) in named_architectures({family.name: family}, "hugging_face")
    }
    if name is not None and name not in known:
        close = nearest(name, list(known))
        raise ConversionError(
            f"--to {shown(name)} is no architecture of models like this one; "
            + (f"did you mean {close}? There are " if close else "there are ")
            + (", ".join(known) or "none")
        )
    reasons = []
    for key in [name] if name else sorted(known, key=lambda other: other != first):
        try:
            known[key].write_config(model)
        except ConversionError as error:
            reasons.append(str(error))
        else:
            return known[key]
    raise ConversionError("\n".join([f"{place}: Hugging Face has no such model:", *reasons]))


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
