"""Paths in a config and on the command line: `~` and variables of the environment.

`~` at the beginning is the home directory (`~name` that of a user), `$NAME` and `${NAME}` are
variables of the environment, and `$$` is a dollar sign. A directory that is really called `~` is
`./~`. An unset or empty variable is an error: `$SCRATCH/run` must not become `/run`.
"""

import os
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer
from pydantic_core import PydanticCustomError

from megapipe.files import shown

HUB = "hf://"
_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{([^}]*)\})")


def expand_path(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The path that `text` stands for; `hf://` names are left alone.

    Raises ValueError, whose text goes on behind "key = value".
    """
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path can")
    if text.startswith(HUB):
        return text

    def value(match: re.Match[str]) -> str:
        dollar, plain, braced = match.groups()
        if dollar:
            return "$"
        name = plain or braced
        if not environment.get(name):
            state = "empty" if name in environment else "not set"
            raise ValueError(
                f"names the variable {shown(name)}, which is {state}: set it, or write $$ "
                "for a dollar sign"
            )
        return environment[name]

    home, rest = _home(text, environment)
    path = home + _VARIABLE.sub(value, rest)
    if not is_unicode(path):
        raise ValueError("is not UTF-8: rename it")
    return f"./{path}" if path.startswith("~") else path


def escape_path(path: str) -> str:
    """What `expand_path` makes `path` of."""
    return path if path.startswith(HUB) else path.replace("$", "$$")


def _home(text: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """The home directory that `text` begins with, or nothing, and the rest of it."""
    if not text.startswith("~"):
        return "", text
    user, slash, rest = text.partition("/")
    if user == "~" and environment.get("HOME"):
        home = environment["HOME"]
    else:
        home = os.path.expanduser(user)
    if home.startswith("~"):
        raise ValueError(
            f"names a home directory that is not known; write ./{shown(text)} for a file"
        )
    return home.rstrip("/") or ("" if slash else "/"), slash + rest


def is_unicode(text: str) -> bool:
    """False for text out of bytes that are not UTF-8, which Python reads as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _expanded(text: str) -> str:
    try:
        return expand_path(text)
    except ValueError as error:
        raise PydanticCustomError("path", "{reason}", {"reason": str(error)}) from None


PathText = Annotated[str, AfterValidator(_expanded), PlainSerializer(escape_path, when_used="json")]
"""The type of a key that holds a path: expanded when it is read, and written so that it is read as
the same path again."""
