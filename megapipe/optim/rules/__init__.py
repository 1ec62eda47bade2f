"""The optimizers: each module here is one, and its `RULE` says what it is.

A new file in this folder is a new value of `optimizer.name`; nothing else has to know it.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from megapipe.optim.definition import UpdateRule


def find_rules() -> dict[str, UpdateRule[Any]]:
    """All optimizers by name, in alphabetical order."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    rules: list[UpdateRule[Any]] = [module.RULE for module in modules]
    return {rule.name: rule for rule in sorted(rules, key=lambda rule: rule.name)}
