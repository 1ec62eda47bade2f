"""A second model family for tests: keys that a gated convolution language model might have."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt

from megapipe.config import Families, ModelConfig
from megapipe.config.contradiction import Problem
from megapipe.config.model import family_key
from megapipe.models.families import FAMILIES
from megapipe.section import Section, or_none_word
from tests.config.examples import Family


class Gate(Section):
    """A table among the family's keys."""

    steepness: float = Field(default=1.0, gt=0.0, description="How sharply the gate opens.")


class ConvolutionConfig(ModelConfig):
    """Keys of every kind: required, derived, a table, absent, one that may change."""

    MAY_CHANGE: ClassVar[frozenset[str]] = ModelConfig.MAY_CHANGE | {"noise"}

    family: Literal["convolution"] = family_key("convolution")
    kernel_width: PositiveInt = Field(description="Tokens that a convolution sees.")
    channels: PositiveInt = Field(
        default_factory=lambda earlier: 2 * earlier["hidden_size"], description="Inner width."
    )
    gate: Gate = Field(default=Gate(), description="The gate.")
    dilation: Annotated[PositiveInt | None, or_none_word(int)] = Field(
        default=None, description="Tokens from one tap to the next."
    )
    noise: float = Field(default=0.0, description="In training only.")

    def problems(self) -> Iterator[Problem]:
        if self.kernel_width > self.max_sequence_length:
            yield Problem("model.kernel_width", "is longer than model.max_sequence_length")

    def tensor_problems(self, tensor: int) -> Iterator[Problem]:
        if self.channels % tensor:
            yield Problem("parallel.tensor", f"must divide model.channels = {self.channels}")

    def kernel_problems(self, *, kernels: bool, attention: bool) -> Iterator[Problem]:
        if kernels and self.kernel_width > 64:
            yield Problem("train.kernels", "takes model.kernel_width up to 64")
        if attention:
            yield Problem("train.attention", "has nothing to compute: there is no attention")

    def narrowed(
        self, *, tensor: int, small_tensor: int, sequence: int, small_sequence: int
    ) -> Self:
        return self.model_copy(update={"hidden_size": 8, "channels": 2 * small_tensor})


SHAPE = {"num_layers": 8, "hidden_size": 64, "vocab_size": 500, "max_sequence_length": 128}
PRESETS = {
    "wide": {**SHAPE, "kernel_width": 7, "gate": {"steepness": 3.0}, "dilation": 2},
}
GPT_ALONE: Families = {"gpt": FAMILIES["gpt"]}
BOTH: Families = {**GPT_ALONE, "convolution": Family("convolution", ConvolutionConfig, PRESETS)}
