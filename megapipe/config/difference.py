"""What two configs disagree on."""

from collections.abc import Sequence
from typing import Any

from megapipe.config.config import Config
from megapipe.config.problems import show

# Keys of [model] that change neither the shape of a weight nor what the network computes.
_FREE = frozenset({"model.preset", "model.dropout", "model.attention_dropout", "model.init_std"})


def difference(old: Config, new: Config, sections: Sequence[str] = ("model",)) -> list[str]:
    """Lines like `model.hidden_size: 256 -> 512`, one for each key that matters.

    Keys that may change within a run (the preset's name, dropout, the spread of initial weights)
    are left out. An empty list says that weights of one config fit the other.
    """
    before, after = _flat(old.model_dump(), sections), _flat(new.model_dump(), sections)
    keys = [key for key in {**before, **after} if key not in _FREE]
    return [
        f"{key}: {_show(before.get(key))} -> {_show(after.get(key))}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def _show(value: Any) -> str:
    return "none" if value is None else show(value)


def _flat(tree: dict[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value for section in sections for key, value in tree[section].items()
    }
