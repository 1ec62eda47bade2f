"""Command-line words that several commands understand."""

import argparse
import difflib
import os
from collections.abc import Collection, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from megapipe.config import Config, load_config, section_types
from megapipe.config.paths import expand_path, is_unicode
from megapipe.conversion.model_at import lend_model
from megapipe.errors import UsageError
from megapipe.files import shown
from megapipe.models.families import FAMILIES


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


def read_config(path: str, overrides: Sequence[str]) -> Config:
    """The config of a command line; keys of [model] may come from the model that it names with
    checkpoint.load_from. Raises ConfigError."""
    return load_config(path, overrides, FAMILIES, partial(lend_model, families=FAMILIES))


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one message, exit status 1, the nearest name."""

    def __init__(
        self,
        command: str,
        description: str,
        epilog: str | None = None,
        *,
        overrides: bool = False,
        **more: Any,
    ) -> None:
        """With `overrides` the command takes `--section.key VALUE` of a config too. `more` is for
        argparse, which makes the parsers of subcommands by this class."""
        super().__init__(
            prog=more.pop("prog", f"megapipe {command}"),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )
        self._overrides = overrides

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own arguments, and the overrides of the config."""
        words, overrides = split_overrides(argv) if self._overrides else (list(argv), [])
        return self.parse_args(words), overrides

    def parse_known_args(  # type: ignore[override]  # argparse overloads it for other namespaces
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse has it, but what is unknown is an error already here: argparse calls this for
        a subcommand too, whose parser alone knows the nearest name. A wrong option is reported
        before anything else, since it may be why something else is missing."""
        try:
            arguments, unknown = super().parse_known_args(args, namespace)
        except UsageError:
            unknown = self._unknown_options(args)
            if not unknown:
                raise
        if unknown:
            raise UsageError(self._describe_unknown(unknown[0]))
        return arguments, []

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        message = message.replace(": expected one argument", " needs a value")
        raise UsageError(f"{message}. Type `{self.prog} --help`.")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """argparse's conversion of a value, whose message for numbers names a type of Python."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if action.type not in (int, float):
                raise
            number = "a whole number" if action.type is int else "a number"
            name = error.argument_name
            raise UsageError(f"{name} {shown(arg_string)} must be {number}.") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's check of choices."""
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            raise UsageError(unknown_command(value, "a subcommand", self.prog, action.choices))
        name = argparse.ArgumentError(action, "").argument_name
        choices = ", ".join(map(str, action.choices))
        raise UsageError(f"{name} {shown(str(value))} is not one of {choices}.")

    def _unknown_options(self, words: Sequence[str]) -> list[str]:
        """Those of this parser's own words, which end where a subcommand begins."""
        own = takewhile(lambda word: word != "--" and word not in self._subcommands(), words)
        options = (word for word in own if word.startswith("--") and " " not in word)
        return [word for word in options if not self._is_option(word)]

    def _is_option(self, word: str) -> bool:
        return word.partition("=")[0] in self._option_string_actions

    def _subcommands(self) -> Collection[str]:
        actions = (one for one in self._actions if isinstance(one, argparse._SubParsersAction))
        return [name for action in actions for name in action.choices]

    def _describe_unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return (
                f"{word!r} is one word too many (a glob needs quotes). Type `{self.prog} --help`."
            )
        close = self._nearest_option(word.partition("=")[0])
        meant = f"did you mean {close}?" if close else f"type `{self.prog} --help`."
        return f"{word} is not an option of `{self.prog}`; {meant}"

    def _nearest_option(self, word: str) -> str | None:
        """An option of this command, or `--section.key` of the config, that `word` may stand for:
        its last part is enough."""
        options = [name for name in self._option_string_actions if name not in ("-h", "--help")]
        keys = config_keys() if self._overrides else []
        choices = {
            **{key.rpartition(".")[2]: f"--{key}" for key in keys},
            **{option.lstrip("-"): option for option in options},
        }
        name = word.lstrip("-")
        for spelling in (name, name.replace("-", "_"), name.replace("_", "-")):
            if close := difflib.get_close_matches(spelling, choices, n=1, cutoff=0.75):
                return choices[close[0]]
        return None


def unknown_command(
    name: str,
    kind: str,
    command: str,
    names: Collection[str],
    options: Collection[str] = ("--help",),
) -> str:
    """The message for a `name` that is none of the `names` or `options` that may follow
    `command`."""
    is_option = name.startswith("--")
    close = difflib.get_close_matches(name, options if is_option else names, n=1)
    meant = f"did you mean `{command} {close[0]}`?" if close else f"see `{command} --help`."
    if is_option:
        return f"{name} is not an option of `{command}`; {meant}"
    return f"{name!r} is not {kind}; {meant} There are {', '.join(names)}."


def path_argument(text: str) -> Path:
    """An argparse type: `~` and variables mean what they mean in a config. Raises UsageError.

    Names that are not UTF-8 are allowed: files may have them.
    """
    if not is_unicode(text):
        return Path(text)
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise UsageError(f"{shown(text)} {error}.") from None


def text_argument(text: str) -> str:
    """An argparse type for text that goes to a tokenizer.

    Raises ArgumentTypeError for bytes that are not UTF-8, which Python keeps as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = f"0x{ord(text[error.start]) - 0xDC00:02x}"
        raise argparse.ArgumentTypeError(
            f"not UTF-8 text: character {error.start + 1} is byte {byte}. Convert it, or see that "
            "the locale is a UTF-8 one"
        ) from None
    return text


def check_output(option: str, path: Path) -> None:
    """Raises UsageError where a file can't be written at `path`: before the work, not after it.

    Directories that are missing count as made.
    """
    named = f"{option} {shown(path)}"
    if os.path.isdir(path):  # unlike Path's, this is False where a name is too long
        raise UsageError(f"{named} is a directory: name a file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{named} is not a regular file.")
    target = _link_target(option, path) if os.path.islink(path) else path.absolute()
    folder = next(parent for parent in target.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise UsageError(f"{named} can't be made: {shown(folder)} is not a directory.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{named} can't be written: no permission to write to {shown(folder)}.")
    longest = max(len(os.fsencode(part)) for part in target.parts)
    if longest > os.pathconf(folder, "PC_NAME_MAX"):
        raise UsageError(f"{named} can't be made: a name of {longest} bytes is too long.")
    whole = len(os.fsencode(target))
    if whole >= os.pathconf(folder, "PC_PATH_MAX"):  # which counts the byte that ends it
        raise UsageError(f"{named} can't be made: a path of {whole} bytes is too long.")


def _link_target(option: str, link: Path) -> Path:
    """The file that a link leads to. Raises UsageError where none can be there."""
    target = Path(os.path.realpath(link))
    if os.path.islink(target):
        raise UsageError(f"{option} {shown(link)} can't be written: it is a link to itself.")
    if not target.parent.is_dir():
        raise UsageError(
            f"{option} {shown(link)} can't be written: it is a link to {shown(target)}, and there "
            f"is no directory {shown(target.parent)}."
        )
    return target


def json_argument(text: str) -> Path:
    """The argparse type of `--json`: a file that can be written. Raises UsageError."""
    path = path_argument(text)
    check_output("--json", path)
    return path


def config_keys() -> list[str]:
    """`section.key` of every key that a config may have, whatever the family of its model."""
    keys = {
        f"{section}.{key}": None
        for family in FAMILIES.values()
        for section, kind in section_types(family.config).items()
        for key in kind.model_fields
    }
    return list(keys)
