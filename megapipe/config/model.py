"""[model]: the shape of the network. With train.seed it fixes the initial weights.

Here are the keys of every family. A family adds its own in a subclass of `ModelConfig`, and says
there what contradicts them.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from pydantic import Field, PositiveInt

from megapipe.config.contradiction import Problem
from megapipe.section import Section

DEFAULT_FAMILY = "gpt"
"""Of a config that names none."""


def family_key(name: str) -> Any:
    """The field `family` of a subclass: `family: Literal["gpt"] = family_key("gpt")`."""
    return Field(
        default=name,
        description="What kind of network this is. It decides which other keys [model] has, and "
        "which presets there are.",
    )


class ModelConfig(Section):
    """What the engine needs to know of a model of any family. [model] is always of a subclass."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"preset"})
    """Keys that change neither the shape of a weight nor what the network computes."""

    family: str = family_key(DEFAULT_FAMILY)
    preset: str | None = Field(
        default=None,
        description="A named shape to start from; keys written beside it win over the preset.",
    )
    num_layers: PositiveInt = Field(description="Blocks of the network.")
    hidden_size: PositiveInt = Field(description="Width of the residual stream.")
    vocab_size: PositiveInt = Field(
        description="Tokens in the vocabulary, at least as many as the tokenizer has. "
        "Padding for the layout is added inside and never seen outside."
    )
    max_sequence_length: PositiveInt = Field(
        description="The longest sequence the model is made for, in tokens."
    )

    def problems(self) -> Iterator[Problem]:
        """What contradicts itself in the shape."""
        yield from ()

    def tensor_problems(self, tensor: int) -> Iterator[Problem]:
        """Why `tensor` ranks can't share the model's matrices."""
        yield from ()

    def kernel_problems(self, *, kernels: bool, attention: bool) -> Iterator[Problem]:
        """Why Triton can't compute the model: its `kernels`, its `attention`, or both.

        The key of a problem is `train.kernels` or `train.attention`, and its text goes on from
        "Triton": `takes heads of up to 256, and ...`.
        """
        yield from ()

    def masks_attention(self, sequence_length: int) -> bool:
        """Whether attention is more than plain and causal: a window, or dropout."""
        return False

    def stage_ends(self, *, first: bool, last: bool) -> list[str]:
        """What the first and the last stage hold beside layers, in words."""
        return ["embedding"] * first + ["output"] * last

    def layout_notes(self, tensor: int) -> Iterator[str]:
        """Lines for people on what `tensor` ranks do to the model."""
        yield from ()

    @abstractmethod
    def narrowed(
        self, *, tensor: int, small_tensor: int, sequence: int, small_sequence: int
    ) -> Self:
        """A model with the same features that is as narrow as they allow, for the
        equivalence check.

        It was made for `tensor` ranks and sequences of `sequence` tokens, and is made for the small
        ones. Depth, vocabulary and max_sequence_length stay as they are.
        """
