"""What two configs disagree on."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from megapipe.config.config import Config
from megapipe.config.model import ModelConfig
from megapipe.config.problems import show


def difference(old: Config, new: Config, sections: Sequence[str] = ("model",)) -> list[str]:
    """Lines like `data.sources[0].weight: 1.0 -> 2.0`, one for each key that matters.

    Keys that may change within a run (the preset's name, dropout, the spread of initial weights)
    are left out. An empty list says that weights of one config fit the other. Of models of two
    families only the families are named.
    """
    lines = []
    before, after = old.model_dump(), new.model_dump()
    for name in sections:
        if name == "model":
            lines += model_difference(old.model, new.model)
        else:
            lines += _lines(_changes(name, before[name], after[name]))
    return lines


def model_difference(old: ModelConfig, new: ModelConfig) -> list[str]:
    """As `difference`, of two shapes of a model."""
    before, after = old.model_dump(), new.model_dump()
    if old.family != new.family:
        before, after = {"family": old.family}, {"family": new.family}
    free = {f"model.{key}" for key in new.MAY_CHANGE}
    changes = _changes("model", before, after)
    return _lines(change for change in changes if change[0] not in free)


def _lines(changes: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{key}: {show(a)} -> {show(b)}" for key, a, b in changes]


def _changes(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever the two trees differ; None where one has no value."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _changes(f"{key}.{name}", old.get(name), new.get(name))
    elif _is_table_array(old) and _is_table_array(new):
        for index, (a, b) in enumerate(zip_longest(old, new)):
            yield from _changes(f"{key}[{index}]", a, b)
    else:
        yield key, old, new


def _is_table_array(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(entry, dict) for entry in value)
