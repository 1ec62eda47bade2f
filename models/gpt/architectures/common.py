"""What all architectures of this family share, whatever the stack."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from megapipe.config import ModelConfig
from megapipe.config.problems import show
from megapipe.errors import ConversionError
from megapipe.layout.architecture import ForeignTensor, whole
from megapipe.layout.parameters import ParameterSpec
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.parameters import parameter_table


class GPTArchitecture(ABC):
    """The functions of an `Architecture`, for a [model] of this family.

    `embedding` and `output` are what the other stack calls the two weights that may be tied.
    """

    embedding: ClassVar[str] = "model.embed_tokens.weight"
    output: ClassVar[str] = "lm_head.weight"

    def write_config(self, model: ModelConfig) -> dict[str, object]:
        return self.config_of(_checked(model))

    def tensors(self, model: ModelConfig) -> Sequence[ForeignTensor]:
        gpt = _checked(model)
        return list(self.tensors_of(gpt, {spec.name: spec for spec in parameter_table(gpt)}))

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        return {self.output: self.embedding} if _checked(model).tie_embeddings else {}

    @abstractmethod
    def config_of(self, model: GPTConfig) -> dict[str, object]:
        """As `write_config`."""

    @abstractmethod
    def tensors_of(
        self, model: GPTConfig, parameters: Mapping[str, ParameterSpec]
    ) -> Iterator[ForeignTensor]:
        """As `tensors`, with our parameters by name."""


def _checked(model: ModelConfig) -> GPTConfig:
    assert isinstance(model, GPTConfig), model.family
    return model


def check_fits(model: GPTConfig, name: str, needed: Mapping[str, object]) -> None:
    """Raises ConversionError where keys of [model] have other values than an architecture needs."""
    problems = [
        f"model.{key} = {show(getattr(model, key))}: {name} has no setting for that, and needs "
        f"{show(value)}"
        for key, value in needed.items()
        if getattr(model, key) != value
    ]
    if problems:
        raise ConversionError("\n  ".join([f"the model can't be exported as {name}:", *problems]))


def renamed(
    parameters: Mapping[str, ParameterSpec], ours: str, theirs: str, *, transposed: bool = False
) -> Iterator[ForeignTensor]:
    """The weight and the bias of a layer, those that there are, under another name."""
    for kind in ("weight", "bias"):
        spec = parameters.get(f"{ours}.{kind}")
        if spec is not None:
            turned = transposed and len(spec.shape) > 1
            yield whole(spec, f"{theirs}.{kind}", transposed=turned)
