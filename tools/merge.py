"""`megapipe merge A B C ... --out DIR`: the average of checkpoints."""

import argparse
import math
from collections.abc import Sequence

from megapipe.amounts import counted
from megapipe.errors import UsageError
from megapipe.files import shown
from megapipe.models.families import FAMILIES
from megapipe.tools.arguments import Parser, path_argument
from megapipe.tools.progress import bytes_bar

_DESCRIPTION = """\
Average checkpoints of one model, in float64, into a checkpoint of weights alone: a run starts from
it, and it exports like any other."""


def run(argv: Sequence[str]) -> int:
    """Exit status 0 when the average is written."""
    parser = Parser("merge", _DESCRIPTION)
    parser.usage = "megapipe merge A B ... --out DIR\n       megapipe merge RUN --last N --out DIR"
    parser.add_argument(
        "paths", type=path_argument, nargs="+", metavar="A", help="a checkpoint; with --last, a run"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="what to write; new"
    )
    parser.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints of a run")
    parser.add_argument(
        "--shares",
        type=_shares,
        metavar="1,2,1",
        help="how much each counts, in the order given, with --last the oldest first "
        "(default: all the same)",
    )
    options = parser.parse(argv)[0]

    from megapipe.checkpoint.merge import merge_checkpoints, newest_checkpoints
    from megapipe.conversion.open import model_of

    paths = options.paths
    if options.last is not None:
        if options.last < 1 or len(paths) != 1:
            raise UsageError(f"--last {options.last} takes 1 or more, of one run.")
        paths = newest_checkpoints(paths[0], options.last)
    _check_shares(options, len(paths))
    merge_checkpoints(
        paths,
        options.out,
        lambda reader: model_of(reader, FAMILIES),
        bytes_bar,
        shares=options.shares,
    )
    for path in paths:
        print(shown(path))
    print(f"Written: {shown(options.out)}, the average of {counted(len(paths), 'checkpoint')}")
    return 0


def _check_shares(options: argparse.Namespace, count: int) -> None:
    if options.shares is not None and len(options.shares) != count:
        raise UsageError(
            f"--shares has {counted(len(options.shares), 'number')} for "
            f"{counted(count, 'checkpoint')}: give one for each."
        )


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--shares {shown(text)} must be numbers, as in 1,2,1.") from None
    if not all(0 < share < math.inf for share in shares):
        raise UsageError(f"--shares {shown(text)} must be more than 0 each.")
    return shares
