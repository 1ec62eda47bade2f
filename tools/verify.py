"""`megapipe verify CONFIG.toml`: check that the layout computes what one process computes."""

from collections.abc import Sequence

from megapipe.errors import UsageError
from megapipe.models.families import FAMILIES
from megapipe.tools.arguments import Parser, path_argument, read_config


def run(argv: Sequence[str]) -> int:
    """Exit status 0 when losses, gradients and weights agree to 1e-9 in float64, else 1."""
    parser = Parser(
        "verify",
        "Check, in float64 on this machine's CPU, that the layout of a config computes what one\n"
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
    config = read_config(arguments.config, overrides)

    from megapipe.equivalence.run import verify

    return verify(config, FAMILIES[config.model.family], str(arguments.config), arguments.steps)
