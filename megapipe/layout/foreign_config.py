"""Reading another stack's config: each key is understood, known to change nothing, or refused."""

import math
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, TypeVar

from megapipe.amounts import counted
from megapipe.config.problems import show
from megapipe.errors import ConversionError
from megapipe.files import shown

Value = TypeVar("Value", int, float, str, bool)

NO_DEFAULT = object()
MOST = 2**31 - 1
"""The largest size that is taken for one: what follows from a size is then soon computed."""
MOST_LAYERS = 2048
"""So many make a table of a few 10,000 tensors; no model is as deep."""
SHOWN = 100
"""How many characters or entries of a value are looked at for a message, which shows fewer."""
MAX_PROBLEMS = 10
"""How many of the problems a message lists."""


class ForeignConfig:
    """The keys of a config, of which each has to be asked for.

    What is wrong is collected, and `finish` raises all of it at once. Until then a key that is
    wrong reads as a value that fits its type.
    """

    def __init__(self, values: Mapping[str, object], place: str = "") -> None:
        """`place` is what stands before the keys in messages, as in `rope_scaling.`"""
        self._values, self._place = values, place
        self._asked: set[str] = set()
        self.problems: list[str] = []

    def take(self, key: str, kind: type[Value], default: object = NO_DEFAULT) -> Value:
        """The value of a key; where it is absent or null, the default that the other stack has.

        Whole numbers are taken for float. Numbers are finite.
        """
        value = self._value(key, default)
        if value is NO_DEFAULT:
            self.problem(key, "is missing, and there is no default for it")
            return kind()
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**1000 else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self._refuse(key, value, f"is not of type {kind.__name__}")
            return kind()
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(key, value, "is not a finite number")
            return kind()
        return value

    def count(
        self, key: str, default: object = NO_DEFAULT, *, least: int = 1, most: int = MOST
    ) -> int:
        """A number of heads, tokens, layers: a whole number from `least` to `most`."""
        known, value = len(self.problems), self.take(key, int, default)
        if len(self.problems) == known and not least <= value <= most:
            self._refuse(key, value, f"is not a whole number from {least} to {most:,}")
        return value if len(self.problems) == known else least

    def optional_count(self, key: str, absent: int | None = None) -> int | None:
        """Such a number, None where it is null, `absent` where there is no such key."""
        self._asked.add(key)
        if key not in self._values:
            return absent
        return None if self._values[key] is None else self.count(key)

    def positive(self, key: str, default: object = NO_DEFAULT) -> float:
        """A number above 0."""
        known, value = len(self.problems), self.take(key, float, default)
        if len(self.problems) == known and value <= 0:
            self._refuse(key, value, "is not above 0")
        return value if len(self.problems) == known else 1.0

    def rate(self, key: str, default: object = NO_DEFAULT) -> float:
        """A probability of dropout, below 1."""
        known, value = len(self.problems), self.take(key, float, default)
        if not 0 <= value < 1:
            self._refuse(key, value, "is not from 0 to less than 1")
        return value if len(self.problems) == known else 0.0

    def pair(self, key: str) -> tuple[int, int] | None:
        """Two whole numbers, or None where the key is absent or null."""
        value = self._value(key, None)
        if value is None:
            return None
        if isinstance(value, list | tuple) and [type(one) for one in value] == [int, int]:
            return value[0], value[1]
        self._refuse(key, value, "is not a pair of whole numbers")
        return None

    def table(self, key: str) -> "ForeignConfig | None":
        """The keys within a key, for `join`; None where there are none."""
        value = self._value(key, None)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            self._refuse(key, value, "is not a table of keys")
            return None
        return ForeignConfig(value, f"{self._place}{key}.")

    def require(self, key: str, default: object, *usable: object) -> None:
        """Refuse a value that is none of `usable`; absent, it is `default`."""
        value = self._value(key, default)
        if not any(value == one and type(value) is type(one) for one in usable):
            known = " or ".join(show(one) for one in usable)
            self._refuse(key, value, f"is not supported (supported: {known})")

    def require_each(self, key: str, count: int, usable: str) -> None:
        """Refuse a list, where there is one, that is not `count` times `usable`."""
        value = self._value(key, None)
        if value is None:
            return
        if not isinstance(value, list) or len(value) != count:
            self._refuse(key, value, f"is not a list of {counted(count, 'entry')}")
        elif other := [entry for entry in value if entry != usable]:
            self._refuse(key, other[0], f"is not supported (supported: {show(usable)})")

    def ignore(self, keys: Collection[str]) -> None:
        """Pass over keys that change nothing of what the model computes."""
        self._asked.update(keys)

    def problem(self, key: str, text: str) -> None:
        """Add a problem with a key."""
        self.problems.append(f"{self._place}{key} {text}")

    def join(self, other: "ForeignConfig") -> None:
        """Add the problems of a table within, and its keys that nobody has asked for."""
        other._refuse_unknown()
        self.problems += other.problems

    def finish(self, keys: Mapping[str, Any]) -> Mapping[str, Any]:
        """Our `keys`, where nothing is wrong. Raises ConversionError with a line for each
        problem."""
        self._refuse_unknown()
        if self.problems:
            lines = self.problems[:MAX_PROBLEMS]
            if len(self.problems) > MAX_PROBLEMS:
                lines.append(f"and {len(self.problems) - MAX_PROBLEMS:,} more")
            raise ConversionError(
                "\n  ".join(["these settings of its config can't be used:", *lines])
            )
        return keys

    def _refuse_unknown(self) -> None:
        for key in sorted(self._values.keys() - self._asked):
            value = self._values[key]
            if value is not None and value is not False:
                self._refuse(key, value, "is a key that is not known here")

    def _value(self, key: str, default: object) -> object:
        self._asked.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def _refuse(self, key: str, value: object, text: str) -> None:
        if isinstance(value, str | list):
            value = value[:SHOWN]
        elif isinstance(value, Mapping):
            value = dict(islice(value.items(), SHOWN))
        self.problem(shown(key[:80])[:80], f"= {show(value)} {text}")
