"""`megapipe verify CONFIG.toml`: prove that the layout computes what one process computes."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megapipe.config import Config, load_config
from megapipe.models.families import FAMILIES
from megapipe.scratch import scratch_directory
from megapipe.tools.arguments import Parser, UsageError, path_argument
from megapipe.tools.auto import without_auto
from megapipe.tools.shrink import shrink


def run(argv: Sequence[str]) -> int:
    """Exit status 0 when losses, gradients and weights agree to 1e-9 in float64, else 1."""
    parser = Parser(
        "verify",
        "Prove, in float64 on this machine's CPU, that the layout of a config computes what one\n"
        "process computes: losses, every gradient, every updated weight.",
        overrides=True,
    )
    parser.add_argument(
        "config", type=path_argument, metavar="CONFIG.toml", help="the config of the run"
    )
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default: 5)")
    arguments, overrides = parser.parse(argv)
    if arguments.steps < 1:
        raise UsageError(f"--steps {arguments.steps} must be 1 or more.")
    config = load_config(arguments.config, overrides, FAMILIES)
    small, changes = shrink(config)
    with scratch_directory() as folder:
        small, found = without_auto(small, folder)
        name = str(arguments.config)
        return _prove(small, [*changes, *found], name, arguments.steps, folder)


def _prove(small: Config, changes: list[str], name: str, steps: int, folder: Path) -> int:
    print(f"Proving the layout of {name} against one process, in float64 on the CPU.")
    if changes:
        print("Changed for the proof, with every feature kept:")
        print("".join(f"  {change}\n" for change in changes), end="")
    sys.stdout.flush()

    # Torch comes with these, before the ranks are forked, so that none of them imports it again.
    from megapipe.distributed.launcher import launch_local
    from megapipe.tools.proving import prove_rank

    parallel = small.parallel
    assert parallel.data is not None
    ranks = parallel.tensor * parallel.pipeline * parallel.data
    return launch_local(partial(prove_rank, small, steps, folder), ranks)
