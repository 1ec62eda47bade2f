"""`megapipe plan CONFIG.toml [--schedule NAME|all]`: the pipeline's schedule, without a run."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megapipe.errors import UsageError
from megapipe.models.families import FAMILIES
from megapipe.pipeline.picture import require_matplotlib
from megapipe.tools.arguments import Parser, check_output, path_argument, read_config

_DESCRIPTION = """\
Draw the pipeline's schedule and say what it costs: bubble, activation memory, transfers.

Nothing is run, and no GPU is needed. Stages cost what their arithmetic costs, embedding and output
layer counted, and transfers take no time; --costs sets equal stages instead, a file of
parallel.stage_costs its own times. Schedule auto is the program of the run directory where that
fits, or else searched for with these costs."""


def run(argv: Sequence[str]) -> int:
    """Exit status 0."""
    parser = Parser("plan", _DESCRIPTION, overrides=True)
    parser.usage = "megapipe plan CONFIG.toml [--section.key VALUE ...] [options]"
    parser.add_argument(
        "config", type=path_argument, metavar="CONFIG.toml", help="the config of the run"
    )
    parser.add_argument(
        "--schedule",
        metavar="NAME",
        help="another schedule than the config's; all, or names between commas: compare them "
        "(auto, whose search may take half a minute, is in all where the config has it: all,auto)",
    )
    parser.add_argument("--out", metavar="FILE.png", help="draw a picture as well")
    parser.add_argument(
        "--costs",
        metavar="F,I,W",
        help="equal stages: times of forward, input gradient and weight gradient of a microbatch "
        "on one rank (all of its stages together)",
    )
    parser.add_argument(
        "--columns", type=int, help="characters in a line of the text (default: the terminal's)"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="the number of processes (default: the fewest the layout needs)",
    )
    arguments, overrides = parser.parse(argv)
    if arguments.world_size is not None and arguments.world_size < 1:
        raise UsageError(f"--world-size {arguments.world_size} must be 1 or more.")
    columns = arguments.columns or shutil.get_terminal_size((100, 24)).columns
    if columns < 40:
        raise UsageError(f"--columns {columns} must be 40 or more.")
    work = None if arguments.costs is None else _costs(arguments.costs)
    out = None if arguments.out is None else _picture(arguments.out)
    config = read_config(arguments.config, overrides)

    from megapipe.plan.schedules import plan

    family = FAMILIES[config.model.family]
    text = plan(config, family, arguments.schedule, work, arguments.world_size, columns, out)
    print(text, end="")
    return 0


def _costs(text: str) -> tuple[float, float, float]:
    try:
        forward, backward_input, backward_weight = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--costs {text} must be three numbers, as in 1,1,1.") from None
    costs = (forward, backward_input, backward_weight)
    if not all(0 < cost < float("inf") for cost in costs):
        raise UsageError(f"--costs {text} must be more than 0 each.")
    return costs


def _picture(name: str) -> Path:
    path = path_argument(name)
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {name} must end in .png.")
    if not path.parent.is_dir():
        raise UsageError(f"--out {name}: there is no directory {path.parent}.")
    check_output("--out", path)
    require_matplotlib(f"--out {name}")
    return path
