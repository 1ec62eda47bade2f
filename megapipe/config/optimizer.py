"""[optimizer]: the keys of the optimizer that `optimizer.name` chooses.

Each optimizer brings a type with its keys (`megapipe.optim`), by which the section is validated.
"""

from collections.abc import Mapping
from typing import Any, Literal, Union

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from megapipe.config.problems import one_of, show
from megapipe.optim import RULES, OptimizerConfig

DEFAULT_OPTIMIZER = "adamw"


def optimizer_type(values: object) -> type[OptimizerConfig]:
    """The type that a section with these values has to fit; without a name, the default's.

    Where the name is wrong it is a type with all keys, which refuses the name.
    """
    name = values.get("name", DEFAULT_OPTIMIZER) if isinstance(values, Mapping) else None
    known = isinstance(name, str) and name in RULES
    return RULES[str(name)].config if known else AnyOptimizerConfig


def read_optimizer(values: object) -> OptimizerConfig:
    """A section as a table, or one that has been read. Raises pydantic's ValidationError."""
    if isinstance(values, OptimizerConfig):
        return values
    return optimizer_type(values).model_validate(values)


def without_effect(key: str, value: object, name: str) -> str | None:
    """What is wrong with a key that another optimizer has; None for one that no optimizer has."""
    owners = [rule.name for rule in RULES.values() if key in rule.config.model_fields]
    if not owners:
        return None
    return (
        f"optimizer.{key} = {show(value)} has no effect with optimizer.name = {show(name)}; "
        f"remove it, or set optimizer.name = {one_of(owners)}"
    )


def _all_keys() -> type[OptimizerConfig]:
    names = Literal[tuple(RULES)]  # type: ignore[valid-type]  # known only when it runs
    fields: dict[str, Any] = {
        "name": (names, Field(default=DEFAULT_OPTIMIZER, description="The update rule."))
    }
    for rule in RULES.values():
        for key, field in rule.config.model_fields.items():
            common = OptimizerConfig.model_fields.get(key)
            if key not in fields and (common is None or _differ(common, field)):
                fields[key] = _described(key)
    return create_model("OptimizerConfig", __base__=OptimizerConfig, **fields)


def _differ(one: FieldInfo, other: FieldInfo) -> bool:
    return (one.default, one.description) != (other.default, other.description)


def _described(key: str) -> tuple[Any, Any]:
    """Type and description of a key as the optimizers have it, with their names."""
    fields = {
        rule.name: rule.config.model_fields[key]
        for rule in RULES.values()
        if key in rule.config.model_fields
    }
    kinds: Any = Union[tuple(field.rebuild_annotation() for field in fields.values())]  # noqa: UP007
    (first, *others) = fields.values()
    if not any(_differ(first, other) for other in others):
        text = f"{', '.join(fields)}: {first.description}"
        return kinds, Field(default=first.default, description=text)
    texts = [
        f"{name}: {field.description} Default: {show(field.default)}."
        for name, field in fields.items()
    ]
    return kinds | None, Field(default=None, description=" ".join(texts))


AnyOptimizerConfig = _all_keys()
"""The keys of all optimizers in one type, for lists of keys and their descriptions."""
