"""SGD with heavy-ball momentum and decoupled weight decay (SGDW, Loshchilov & Hutter 2019).

    m = momentum * m + g
    w = (1 - lr * decay) w - lr * m

Momentum as in torch.optim.SGD: the gradient joins it in full, and the rate applies to the sum.
"""

from typing import Annotated, Literal

from pydantic import Field

from megapipe.optim.definition import (
    FlatParameters,
    OptimizerConfig,
    ParameterGroup,
    StateTensor,
    StepInputs,
    UpdateRule,
    decay_groups,
)


class SGDConfig(OptimizerConfig):
    """Keys of SGD."""

    name: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.9, description="What is left of the sum of earlier gradients after a step."
    )


def groups(config: SGDConfig) -> tuple[ParameterGroup, ...]:
    """Without momentum nothing is kept."""
    state = (StateTensor("momentum_buffer"),) if config.momentum else ()
    return decay_groups(config, *state)


def update(
    config: SGDConfig, group: ParameterGroup, flat: FlatParameters, step: StepInputs
) -> None:
    direction = flat.gradients.mul_(step.gradient_scale)
    if config.momentum:
        direction = flat.state["momentum_buffer"].mul_(config.momentum).add_(direction)
    flat.master.mul_(1 - step.learning_rate * group.weight_decay)
    flat.master.add_(direction, alpha=-step.learning_rate)


RULE = UpdateRule(SGDConfig, groups, update)
