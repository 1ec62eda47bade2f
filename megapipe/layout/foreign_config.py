"""Reading another stack's config: each key is understood, known to change nothing, or refused."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from megapipe.config.problems import show
from megapipe.errors import ConversionError
from megapipe.files import shown

Value = TypeVar("Value", int, float, str, bool)

NO_DEFAULT = object()


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

        Whole numbers are taken for float.
        """
        value = self._value(key, default)
        if value is NO_DEFAULT:
            self.problem(key, "is missing, and there is no default for it")
            return kind()
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        self._refuse(key, value, f"is not of type {kind.__name__}")
        return kind()

    def optional(self, key: str, kind: type[Value], absent: Value | None = None) -> Value | None:
        """The value of a key, None where it is null, `absent` where there is no such key."""
        self._asked.add(key)
        if key not in self._values:
            return absent
        return None if self._values[key] is None else self.take(key, kind)

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
        """The keys within a key, of which `finish` of this config asks too; None where absent."""
        value = self._value(key, None)
        if value is None:
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
            self._refuse(key, value, f"asks for what is not computed here ({known} is)")

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
            raise ConversionError("\n  ".join(["the config can't be honoured:", *self.problems]))
        return keys

    def _refuse_unknown(self) -> None:
        for key in self._values.keys() - self._asked:
            value = self._values[key]
            if value is not None and value is not False:
                self._refuse(key, value, "is a key that is not known here")

    def _value(self, key: str, default: object) -> object:
        self._asked.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def _refuse(self, key: str, value: object, text: str) -> None:
        written = shown(show(value))
        name = key if key.isprintable() else ascii(key)
        self.problems.append(f"{self._place}{name} = {written[:120]} {text}")
