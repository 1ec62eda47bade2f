"""`megapipe inspect PATH` or `--diff A B`: what is in a directory of tensors, and is it whole."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from megapipe.config.save import write_text
from megapipe.conversion.inspection.inspect import report_one, report_two
from megapipe.errors import UsageError
from megapipe.models.families import FAMILIES
from megapipe.tools.arguments import Parser, json_argument, path_argument
from megapipe.tools.progress import bytes_bar

_DESCRIPTION = """\
Say what a checkpoint holds and whether it is whole (exit status 1 if not), or how two differ
(exit status 1 if they do). All work is done in bounded memory."""
STANDARD_OUTPUT = "-"
PIPE_COLUMNS = 1000
"""Wide enough for every row: programs that read the tables get one line for each."""


def run(argv: Sequence[str]) -> int:
    """Print the summary of a checkpoint, a list of a run's, or the difference of two; 1 where any
    of it is damaged, or they differ."""
    options = _parse(argv)
    if options.diff:
        first, second = options.diff
        report = report_two(first, second, FAMILIES, bytes_bar)
    else:
        report = report_one(
            options.path,
            FAMILIES,
            read=options.verify,
            tensors=options.tensors,
            stats=options.stats,
            bar=bytes_bar,
        )
    if options.json == STANDARD_OUTPUT:
        print(report.json(), end="")
        return report.status
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    Console(highlight=False, soft_wrap=True, width=width).print(*report.parts, sep="\n")
    if options.json is not None:
        write_text(report.json(), options.json)
    return report.status


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("inspect", _DESCRIPTION)
    parser.add_argument(
        "path",
        type=path_argument,
        nargs="?",
        help="a checkpoint, a run directory to list all of, or another stack's directory (Hugging "
        "Face's, Megatron's)",
    )
    parser.add_argument(
        "--diff",
        type=path_argument,
        nargs=2,
        metavar=("A", "B"),
        help="say instead which tensors of two differ, and by how much",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--stats",
        action="store_true",
        help="list every tensor with its norm, largest value, mean and what is not finite",
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="look only at the manifest and the sizes of the files, not at their bytes",
    )
    parser.add_argument(
        "--json",
        type=lambda text: text if text == STANDARD_OUTPUT else json_argument(text),
        metavar="FILE",
        help="also write all of it there; - for standard output, in place of the tables",
    )
    options = parser.parse(argv)[0]
    if (options.path is None) == (options.diff is None):
        raise UsageError("Name a directory, or two with --diff. Type `megapipe inspect --help`.")
    if options.diff and (options.tensors or options.stats):
        raise UsageError("--diff lists the tensors that differ: leave --tensors and --stats out.")
    return options
