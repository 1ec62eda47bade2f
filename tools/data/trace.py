"""`megapipe data trace RUN`: which rows a step read, and every use of a row."""

import argparse
import re
from collections.abc import Sequence

from megapipe.data.trace.replay import Replay, run_config
from megapipe.data.trace.search import Wanted
from megapipe.errors import UsageError
from megapipe.files import shown
from megapipe.models.families import FAMILIES
from megapipe.tools.arguments import Parser, json_argument, path_argument
from megapipe.tools.data.steps import trace_steps
from megapipe.tools.data.uses import trace_rows

_DESCRIPTION = """\
Say which rows each sample of some steps was made of, and check by the hashes in metrics.jsonl that
these are the batches that were trained (exit status 1 where not). Or say of a row when it was
trained. It takes the run directory of any layout and the sources, and no GPU: steps are read again
from the nearest position that the run has kept."""
_USAGE = """\
megapipe data trace RUN --steps A-B [--text] [--verify-only] [--json FILE]
       megapipe data trace RUN --id X | --row FILE:PLACE [--json FILE]"""
STEPS = re.compile(r"(\d+)(?:-(\d+))?")


def run(argv: Sequence[str]) -> int:
    """Print the rows or the uses; 1 where steps are not those that were trained, or no row is
    found."""
    options = _parse(argv)
    replay = Replay(run_config(options.run, FAMILIES), options.run)
    if options.steps is None:
        return trace_rows(replay, options.run, options.wanted, options.json)
    return trace_steps(replay, options)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("data trace", _DESCRIPTION)
    parser.usage = _USAGE
    parser.add_argument("run", type=path_argument, metavar="RUN", help="the directory of a run")
    parser.add_argument(
        "--steps", type=_steps, metavar="A-B", help="steps as metrics.jsonl numbers them, or one"
    )
    parser.add_argument("--text", action="store_true", help="print the text of each row too")
    parser.add_argument(
        "--verify-only", action="store_true", help="only check the steps; print no rows"
    )
    parser.add_argument("--id", metavar="X", help="every use of the rows with this id (id_field)")
    parser.add_argument(
        "--row",
        metavar="FILE:PLACE",
        help="every use of the row at a place, as --steps prints it: data/a.jsonl:4096 for a byte, "
        "data/a.parquet:12 for a row",
    )
    parser.add_argument("--json", type=json_argument, metavar="FILE", help="also write it there")
    options = parser.parse(argv)[0]
    asked = [options.steps, options.id, options.row]
    if sum(one is not None for one in asked) != 1:
        raise UsageError(
            "Name steps with --steps, or a row with --id or --row. Type `megapipe data trace "
            "--help`."
        )
    if options.steps is None and (options.text or options.verify_only):
        raise UsageError("--text and --verify-only are for --steps: leave them out.")
    if options.text and options.verify_only:
        raise UsageError("--verify-only prints no rows: leave --text out.")
    options.wanted = Wanted.of(options.id, options.row) if options.steps is None else None
    return options


def _steps(text: str) -> tuple[int, int]:
    match = STEPS.fullmatch(text.replace(",", ""))
    if match is None:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no step, such as 7, or steps: 7-9")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}: the first step is 1, and the last must not be before the first"
        )
    return first, last
