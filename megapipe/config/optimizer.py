"""[optimizer]: the update rule and its learning rate over time."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megapipe.config.section import Section, or_none_word

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _tenth_of_peak(earlier: dict[str, Any]) -> float:
    return float(earlier["learning_rate"]) / 10


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay (none on norms and biases)."""

    name: Literal["adamw"] = Field(default="adamw", description="The update rule.")
    learning_rate: PositiveFloat = Field(default=3e-4, description="The highest learning rate.")
    min_learning_rate: NonNegativeFloat = Field(
        default_factory=_tenth_of_peak,
        description="Where the decay ends. Default: learning_rate / 10.",
    )
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="Decay of the running means of gradient and square."
    )
    epsilon: PositiveFloat = Field(
        default=1e-8, description="Added to the root of the running mean square."
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
