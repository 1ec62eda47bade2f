"""Commands whose first word names one of several, each of which is a file of their folder."""

import importlib
from collections.abc import Callable, Mapping, Sequence

from megapipe.errors import UsageError
from megapipe.tools.arguments import unknown_command


def run_member(
    argv: Sequence[str], group: str, kind: str, members: Mapping[str, str], package: str
) -> int:
    """Run the member that the first word names, or print what there is; `kind` is what a member is
    called, with its article. Raises UsageError for another word, or none."""
    command, words = f"megapipe {group}", list(argv)
    if not words:
        raise UsageError(f"{kind} is missing: name one. Type `{command} --help`.")
    if words[0] in ("--help", "-h"):
        width = max(map(len, members)) + 2
        print(f"usage: {command} NAME [options]\n")
        print("\n".join(f"  {name:<{width}}{summary}" for name, summary in members.items()))
        return 0
    if words[0] not in members:
        raise UsageError(unknown_command(words[0], kind, command, members))
    module = importlib.import_module(f"{package}.{words[0]}")
    member: Callable[[Sequence[str]], int] = module.run
    return member(words[1:])
