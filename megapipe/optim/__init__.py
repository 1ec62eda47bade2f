"""Optimizers: what each keeps for a parameter and does in a step, and the learning rate over a run.

Read `definition` first, then `rules/sgd`. torch is imported when a step is taken and not before:
the config, the dry run and plans ask the same objects that training runs.
"""

from megapipe.optim.definition import (
    FlatParameters,
    OptimizerConfig,
    ParameterGroup,
    StateTensor,
    StepInputs,
    UpdateRule,
    decay_groups,
)
from megapipe.optim.registry import RULES, parameter_groups

__all__ = [
    "RULES",
    "FlatParameters",
    "OptimizerConfig",
    "ParameterGroup",
    "StateTensor",
    "StepInputs",
    "UpdateRule",
    "decay_groups",
    "parameter_groups",
]
