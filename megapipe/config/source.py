"""Where the values of a config come from: the file, its lines, the command line, a preset."""

import difflib
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any

from megapipe.amounts import counted
from megapipe.config.paths import is_unicode
from megapipe.errors import ConfigError
from megapipe.files import reason, shown

KeyPath = tuple[str | int, ...]

BEYOND_PYTHON = (ValueError, RecursionError)
"""What tomllib raises for numbers of thousands of digits, and for brackets nested as deep."""
LONGEST_INDEX = 9

_HEADER = re.compile(r"^\s*(\[\[?)\s*([\w.\-]+)\s*\]")
_KEY = re.compile(r"^\s*([\w.\-]+)\s*=")


def dotted(path: KeyPath) -> str:
    """`data.sources.0.path`, for messages."""
    return ".".join(shown(str(part)) for part in path)


@dataclass
class ConfigSource:
    """Raw values under `tree`, and what is needed to say where a value was written.

    `preset` is the name of the one that was merged, `preset_keys` the keys of [model] it gives;
    `load_from` and `loaded_keys` are those of the model that lies under it.
    """

    name: str
    text: str
    tree: dict[str, Any]
    overridden: set[KeyPath] = field(default_factory=set)
    preset: str | None = None
    preset_keys: frozenset[str] = frozenset()
    load_from: str | None = None
    loaded_keys: frozenset[str] = frozenset()
    model_unknown: bool = False
    """There is no such preset, or no model to load: who knows what it would have given."""

    def where(self, path: KeyPath) -> str:
        """`run.toml:12`, `command line`, `run.toml, preset "gpt2"` or `run.toml, load_from "x"`."""
        if any(path[: len(key)] == key for key in self.overridden):
            return "command line"
        line, matched = self._line(path)
        if len(path) > 1 and path[0] == "model" and matched < 2:
            if path[1] in self.preset_keys:
                return f'{self.name}, preset "{self.preset}"'
            if path[1] in self.loaded_keys:
                return f'{self.name}, checkpoint.load_from "{self.load_from}"'
        if not line and any(key[: len(path)] == path for key in self.overridden):
            return "command line"  # a table that only overrides made
        return f"{self.name}:{line}" if line else self.name

    def _line(self, path: KeyPath) -> tuple[int, int]:
        """The line that says most of `path`, and how many of its parts are found there."""
        best_line, best = 0, 0
        table: KeyPath = ()
        counts: dict[str, int] = {}
        for number, line in enumerate(self.text.splitlines(), start=1):
            if header := _HEADER.match(line):
                table = tuple(header[2].split("."))
                if header[1] == "[[":
                    index = counts.get(header[2], 0)
                    counts[header[2]] = index + 1
                    table = (*table, index)
                here = table
            elif key := _KEY.match(line):
                here = (*table, *key[1].split("."))
            else:
                continue
            if len(here) > best and path[: len(here)] == here:
                best_line, best = number, len(here)
        return best_line, best


def read_source(path: Path) -> ConfigSource:
    """The TOML file as it is written. Raises ConfigError when it can't be read."""
    name = shown(path)
    try:
        text = decode_toml(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError([f"{name}: there is no such file.{_similar_file(path)}"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{name}: is a directory; name a .toml file in it."]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{name}: is not UTF-8 text (byte {error.start}): {error.reason}. Save it as UTF-8."]
        ) from None
    except OSError as error:
        raise ConfigError([f"{name}: can't be read: {reason(error)}"]) from None
    return parse_source(text, name)


def decode_toml(content: bytes) -> str:
    """The text of a TOML file, which may begin with a byte order mark. Raises UnicodeDecodeError
    for what is not UTF-8."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnicodeDecodeError("utf-8", content, 0, 1, "it is UTF-16")
    if b"\0" in content:
        place = content.index(b"\0")
        raise UnicodeDecodeError("utf-8", content, place, place + 1, "it holds NUL bytes")
    text = content.decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_source(text: str, name: str) -> ConfigSource:
    """TOML text; `name` stands for the file in messages."""
    try:
        return ConfigSource(name, text, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(text, name, str(error))]) from None
    except BEYOND_PYTHON as error:
        raise ConfigError([f"{name}: can't be read: {_limit(error)}."]) from None


def _limit(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "brackets are nested too deep"
    return f"a number has more than {sys.get_int_max_str_digits():,} digits"


def _syntax_problem(text: str, name: str, error: str) -> str:
    place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", error)
    if place is None or place[1] is None:
        return f"{name}: is not valid TOML: {error}."
    number, column = int(place[1]), int(place[2])
    lines = text.splitlines()
    line = lines[number - 1] if number <= len(lines) else ""
    message = error[: place.start()]
    hint = " Text values need quotes, and true and false are lower case."
    return (
        f"{name}:{number}: is not valid TOML: {message} at column {column}."
        f"{hint if 'value' in message.lower() else ''}\n    {shown(line)}"
    )


def _similar_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Neither is there a directory {shown(path.parent)}."
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".toml"]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {shown(path.parent / close[0])}?" if close else ""


def parse_value(text: str) -> Any:
    """A command-line value: TOML where it is TOML, else the text itself.

    `4`, `true`, `[2, 3]` and `"a b"` are TOML; `gpipe` and `runs/x` are not, and mean themselves.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except BEYOND_PYTHON:  # TOMLDecodeError is a ValueError
        return text
    value = parsed["value"]
    return text if len(parsed) > 1 or isinstance(value, date | time) else value


def parse_overrides(arguments: Sequence[str]) -> list[tuple[KeyPath, Any]]:
    """`--section.key VALUE` and `--section.key=VALUE`, in order; the last of a key wins."""
    found: list[tuple[KeyPath, Any]] = []
    problems: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not key:
            problems.append(
                f"command line: {argument!r} is not an override; write --section.key VALUE."
            )
            continue
        if not equals:
            if not remaining or re.match(r"--[a-z]", remaining[0]):
                name = shown(key)
                problems.append(f"command line: --{name} needs a value, as in --{name} VALUE.")
                continue
            text = remaining.pop(0)
        if not is_unicode(argument + text):
            problems.append(
                f"command line: --{shown(key)} {shown(text)} is not UTF-8, as all of a config has "
                "to be. Rename the file or convert the text; in a glob, ? stands for such a byte."
            )
            continue
        parts = key.replace("-", "_").split(".")
        path = tuple(int(part) if _is_index(part) else part for part in parts)
        found.append((path, parse_value(text)))
    if problems:
        raise ConfigError(problems)
    return found


def _is_index(part: str) -> bool:
    return part.isdecimal() and len(part) <= LONGEST_INDEX


def apply_overrides(source: ConfigSource, overrides: Sequence[tuple[KeyPath, Any]]) -> list[str]:
    """Puts the values into the tree; returns what can't be put."""
    problems = []
    for path, value in overrides:
        blocked = _put(source.tree, path, value)
        if blocked:
            problems.append(f"command line: --{dotted(path)}: {blocked}.")
        else:
            source.overridden.add(path)
    return problems


def _put(tree: dict[str, Any], path: KeyPath, value: Any) -> str | None:
    node: Any = tree
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, dict) and isinstance(part, str):
            node.setdefault(part, value if last else _empty(path[depth + 1]))
        elif isinstance(node, list) and isinstance(part, int):
            if part > len(node):
                entries = counted(len(node), "entry")
                return f"{dotted(path[:depth])} has {entries}, so the next is {len(node)}"
            if part == len(node):
                node.append(_empty(path[depth + 1]) if not last else value)
        else:
            return f"{dotted(path[:depth])} has no parts that could be set by name"
        if last:
            node[part] = value
        node = node[part]
    return None


def _empty(part: str | int) -> dict[str, Any] | list[Any]:
    return [] if isinstance(part, int) else {}


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over`, table by table."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged
