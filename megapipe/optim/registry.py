"""The optimizers by name."""

from collections.abc import Sequence
from typing import Any

from megapipe.optim.definition import OptimizerConfig, ParameterGroup, UpdateRule
from megapipe.optim.rules import find_rules

RULES: dict[str, UpdateRule[Any]] = find_rules()


def parameter_groups(config: OptimizerConfig) -> Sequence[ParameterGroup]:
    """The groups of the optimizer that the config chooses."""
    return RULES[config.name].groups(config)
