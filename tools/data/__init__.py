"""`megapipe data NAME`: what a run's data holds."""

import importlib
from collections.abc import Callable, Sequence

from megapipe.errors import UsageError
from megapipe.tools.arguments import unknown_command

ACTIONS = {
    "audit": "read all data of a config once: tokens, duplicates, damage, epochs, shuffle",
    "look": "show what a step of a config will see: samples with token borders and documents",
    "trace": "say which rows steps of a run were made of, or when a row was trained",
}


def run(argv: Sequence[str]) -> int:
    """Run what the first word names: a file of this folder, with a function `run`."""
    name, *words = argv or ("",)
    if name in ("--help", "-h"):
        width = max(map(len, ACTIONS)) + 2
        print("usage: megapipe data NAME [options]\n")
        print("\n".join(f"  {one:<{width}}{summary}" for one, summary in ACTIONS.items()))
        return 0
    if not name:
        raise UsageError(f"name one of {', '.join(ACTIONS)}. Type `megapipe data --help`.")
    if name not in ACTIONS:
        raise UsageError(unknown_command(name, "a subcommand", "megapipe data", ACTIONS))
    action: Callable[[Sequence[str]], int] = importlib.import_module(
        f"megapipe.tools.data.{name}"
    ).run
    return action(words)
