"""Command-line words that several commands understand."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from megapipe.config import section_types
from megapipe.errors import MegapipeError


class UsageError(MegapipeError):
    """A command line that can't be understood; the text says what to type."""


def check_text(text: str, option: str) -> None:
    """Raises UsageError for an argument whose bytes are not UTF-8, which Python keeps as halves of
    surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = f"byte 0x{ord(text[error.start]) - 0xDC00:02x}"
        raise UsageError(
            f"{option} is not UTF-8 text (character {error.start + 1} is {byte}); "
            "convert it, or see that the locale is a UTF-8 one."
        ) from None


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets `--section.key VALUE` and `--section.key=VALUE` apart: (other words, overrides).

    A word is an override when it starts with `--` and has a dot before any `=`. This is done before
    argparse sees the words, since it would take VALUE for a positional argument.
    """
    others: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if not (name.startswith("--") and "." in name):
            others.append(word)
            continue
        overrides.append(word)
        if not equals:
            overrides += [value for value in [next(words, None)] if value is not None]
    return others, overrides


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one message, exit status 1, the nearest name."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"megapipe {command}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. Type `{self.prog} --help`.")

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own arguments, and the overrides of the config."""
        words, overrides = split_overrides(argv)
        arguments, unknown = self.parse_known_args(words)
        if unknown:
            raise UsageError(self._unknown(unknown[0]))
        return arguments, overrides

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{word!r} is one word too many. Type `{self.prog} --help`."
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        keys = [key for key in config_keys() if key.endswith(f".{name}")]
        options = [*self._option_string_actions, *(f"--{key}" for key in config_keys())]
        close = [f"--{key}" for key in keys] or difflib.get_close_matches(word, options, n=1)
        meant = f"did you mean {close[0]}?" if close else f"type `{self.prog} --help`."
        return f"{word} is not an option of `{self.prog}`; {meant}"


def config_keys() -> list[str]:
    """`section.key` of every key of a config."""
    return [
        f"{section}.{key}" for section, kind in section_types().items() for key in kind.model_fields
    ]
