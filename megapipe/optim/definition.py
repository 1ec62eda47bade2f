"""What an optimizer is: its keys of the config, its groups of parameters, its state and step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megapipe.parameter_role import Role
from megapipe.section import Section, or_none_word

if TYPE_CHECKING:
    from torch import Tensor

    from megapipe.kernels import Backend


def _tenth_of_peak(earlier: dict[str, Any]) -> float:
    return float(earlier["learning_rate"]) / 10


class OptimizerConfig(Section):
    """The keys of [optimizer] that every optimizer has. Each has a subclass with its own keys."""

    name: str = Field(description="The update rule.")
    learning_rate: PositiveFloat = Field(default=3e-4, description="The highest learning rate.")
    min_learning_rate: NonNegativeFloat = Field(
        default_factory=_tenth_of_peak,
        description="Where the decay ends. Default: learning_rate / 10.",
    )
    weight_decay: NonNegativeFloat = Field(
        default=0.1, description="Decoupled decay of matrices and embeddings, per unit of rate."
    )
    clip_grad_norm: NonNegativeFloat = Field(
        default=1.0,
        description="Gradients with a larger global norm are scaled down to it; 0 for no clipping.",
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="cosine",
        description="Learning rate after warm-up: constant; linear or cosine decay to "
        "min_learning_rate; wsd stays up and decays linearly at the end.",
    )
    warmup_steps: NonNegativeInt = Field(
        default=0, description="Steps over which the rate rises linearly from 0."
    )
    decay_steps: Annotated[PositiveInt | None, or_none_word(int)] = Field(
        default=None,
        description="Length of the decay in steps. Default: from the end of warm-up to "
        "train.steps (linear, cosine); the last tenth of train.steps (wsd).",
    )


@dataclass(frozen=True)
class StateTensor:
    """A value that an optimizer keeps for each element of a parameter, zero at the start.

    Checkpoints hold it as `name/PARAMETER`. `dtype` is torch's name of one of the dtypes in
    `megapipe.precision`; None for that of the master weights.
    """

    name: str
    dtype: str | None = None


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that an optimizer treats alike: those of some roles."""

    roles: tuple[Role, ...]
    weight_decay: float
    state: tuple[StateTensor, ...]


@dataclass(frozen=True)
class FlatParameters:
    """A rank's parameters of one group in a row, [N] each; between them lies padding.

    Padding is zero in all of them and has to stay zero. `weights` is the copy that the model
    computes with where `master` is wider, None where `master` is what it computes with.
    """

    master: "Tensor"
    gradients: "Tensor"
    state: Mapping[str, "Tensor"]
    weights: "Tensor | None"


@dataclass(frozen=True)
class StepInputs:
    """What a step is taken with, the same for all groups.

    `number` counts the run's steps from 1. Gradients are to be multiplied by `gradient_scale`
    first: it makes means of sums over tokens, and clips them.
    """

    number: int
    learning_rate: float
    gradient_scale: float
    backend: "Backend"


ConfigT = TypeVar("ConfigT", bound=OptimizerConfig)


@dataclass(frozen=True)
class UpdateRule(Generic[ConfigT]):
    """An optimizer. A module of `rules` defines it as its `RULE`.

    config: its keys; the default of `name` is the optimizer's name.
    groups: (config) -> its groups; each role is in one of them.
    update: (config, group, parameters, step) changes `master` and `state` in place; it may
        overwrite `gradients`, which nothing reads after it. It sees no matrices, but one long row
        of numbers.
    rounds_weights: `update` rounds `master` into `weights` too, which else is done after it.
    """

    config: type[ConfigT]
    groups: Callable[[ConfigT], Sequence[ParameterGroup]]
    update: Callable[[ConfigT, ParameterGroup, FlatParameters, StepInputs], None]
    rounds_weights: bool = False

    @property
    def name(self) -> str:
        """The value of optimizer.name."""
        return str(self.config.model_fields["name"].default)


def decay_groups(config: OptimizerConfig, *state: StateTensor) -> tuple[ParameterGroup, ...]:
    """The usual two: weight decay on all that is multiplied with activations or looked up, none on
    norms and biases. Both keep the same state."""
    decayed = (Role.MATRIX, Role.EMBEDDING, Role.OUTPUT)
    return (
        ParameterGroup(decayed, config.weight_decay, state),
        ParameterGroup((Role.NORM, Role.BIAS), 0.0, state),
    )
