"""AdamW (Loshchilov & Hutter 2019): Adam with decoupled weight decay."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from megapipe.optim.definition import (
    FlatParameters,
    OptimizerConfig,
    ParameterGroup,
    StateTensor,
    StepInputs,
    UpdateRule,
    decay_groups,
)

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class AdamWConfig(OptimizerConfig):
    """Keys of AdamW."""

    name: Literal["adamw"] = "adamw"
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="Decay of the running means of gradient and square."
    )
    epsilon: PositiveFloat = Field(
        default=1e-8, description="Added to the root of the running mean square."
    )


def groups(config: AdamWConfig) -> tuple[ParameterGroup, ...]:
    return decay_groups(config, StateTensor("exp_avg"), StateTensor("exp_avg_sq"))


def update(
    config: AdamWConfig, group: ParameterGroup, flat: FlatParameters, step: StepInputs
) -> None:
    """All of it in one pass. torch leaves the gradients scaled, Triton as they were."""
    from megapipe.kernels import adamw_

    adamw_(
        flat.master,
        flat.gradients,
        flat.state["exp_avg"],
        flat.state["exp_avg_sq"],
        step=step.number,
        learning_rate=step.learning_rate,
        betas=config.betas,
        epsilon=config.epsilon,
        weight_decay=group.weight_decay,
        gradient_scale=step.gradient_scale,
        weights=flat.weights,
        backend=step.backend,
    )


RULE = UpdateRule(AdamWConfig, groups, update, rounds_weights=True)
