"""`megapipe data NAME`: what a run's data holds."""

from collections.abc import Sequence

from megapipe.tools.groups import run_member

ACTIONS = {
    "audit": "read all data of a config once: tokens, duplicates, damage, epochs, shuffle",
    "look": "show what a step of a config will see: samples with token borders and documents",
    "trace": "say which rows steps of a run were made of, or when a row was trained",
}


def run(argv: Sequence[str]) -> int:
    """Run the action that the first word names."""
    return run_member(argv, "data", "a subcommand", ACTIONS, __name__)
