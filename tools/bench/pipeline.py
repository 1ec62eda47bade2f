"""`megapipe bench pipeline`: what the pipeline runtime costs, by schedule.

Real processes run real programs on stages that only take time, F = I = W.
What a step takes beyond the simulation of its own program, with the times that its own stages have
measured, is the runtime's: Python, messages, and waking up. torch.distributed.pipelining does the
same with the same stages, in turn with us.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import Any, NamedTuple

from megapipe.errors import MegapipeError, ScheduleError, UsageError
from megapipe.pipeline.schedule import SCHEDULES
from megapipe.scratch import scratch_directory
from megapipe.tools.arguments import Parser, json_argument
from megapipe.tools.bench.crew import Crew
from megapipe.tools.bench.machine import write_json
from megapipe.tools.bench.pipeline_figures import Cell, CellResults, Steps, measured, print_table

WORKER = "megapipe.tools.bench.pipeline_worker"
WORK = ("sleep", "compute")
NOTICE = 0.02
"""Seconds from the order for a step to its beginning."""


class Options(NamedTuple):
    """The command line, understood."""

    cells: list[Cell]
    left_out: list[str]
    contenders: list[str]
    repeats: int
    floats: int
    work: str


def run(argv: Sequence[str]) -> int:
    """Measure, print the table, write the JSON."""
    words, _ = _parser().parse(argv)
    options = _understand(words)
    for line in options.left_out:
        print(f"left out: {line}", file=sys.stderr)
    rows = _measure(options)
    print_table(rows, options.contenders)
    write_json(words, "pipeline", results=[row.as_json() for row in rows])
    return 0


def _parser() -> Parser:
    parser = Parser(
        "bench pipeline",
        "Bubble and overhead of the pipeline runtime, by schedule: processes of one thread, with\n"
        "stages that take a set time. The default takes about a quarter of an hour with torch.",
    )
    parser.add_argument("--against", choices=("torch",), help="torch.distributed.pipelining, too")
    for name, default, text in (
        ("schedules", ",".join(SCHEDULES), "which of them, between commas"),
        ("ranks", "2,4", "pipeline sizes"),
        ("microbatches", "8,16,32", "in a step"),
        ("virtual", "1,2,4", "stages on a rank, where the schedule can have them"),
        ("unit-ms", "20,2", "milliseconds that F, I and W of a stage each take"),
    ):
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default: {default})")
    parser.add_argument("--repeats", default="3", help="measured steps of each (default: 3)")
    parser.add_argument("--floats", default="8", help="size of an activation (default: 8)")
    parser.add_argument(
        "--work",
        choices=WORK,
        default="sleep",
        help="how the stages spend the time (default: sleep, which takes no core)",
    )
    parser.add_argument(
        "--json", type=json_argument, metavar="FILE", help="also write all figures there"
    )
    return parser


# --- The command line ----------------------------------------------------------------------------


def _understand(words: Namespace) -> Options:
    schedules = words.schedules.split(",")
    for name in schedules:
        if name not in SCHEDULES:
            raise UsageError(f"--schedules: {name!r} is not one of {', '.join(SCHEDULES)}.")
    wanted = [
        Cell(ranks, unit_ms, name, virtual, microbatches)
        for ranks in _whole_numbers("--ranks", words.ranks, least=2)
        for unit_ms in _units(words.unit_ms)
        for name in schedules
        for virtual in _whole_numbers("--virtual", words.virtual)
        for microbatches in _whole_numbers("--microbatches", words.microbatches)
    ]
    cells, left_out = _possible(wanted, schedules)
    return Options(
        cells,
        left_out,
        ["megapipe"] + ([words.against] if words.against else []),
        _whole_number("--repeats", words.repeats),
        _whole_number("--floats", words.floats),
        words.work,
    )


def _whole_numbers(option: str, text: str, least: int = 1) -> list[int]:
    return [_whole_number(option, word, least) for word in text.split(",")]


def _whole_number(option: str, word: str, least: int = 1) -> int:
    if not word.strip().isdecimal() or int(word) < least:
        raise UsageError(f"{option}: {word!r} must be a whole number, {least} or more.")
    return int(word)


def _units(text: str) -> list[float]:
    units = []
    for word in text.split(","):
        try:
            units.append(float(word))
        except ValueError:
            units.append(0.0)
        if not 0 < units[-1] <= 10_000:
            raise UsageError(f"--unit-ms: {word!r} must be a number above 0, at most 10000.")
    return units


def _possible(wanted: Sequence[Cell], schedules: Sequence[str]) -> tuple[list[Cell], list[str]]:
    """The cells that exist, and why others don't. That a schedule can't have some of the chunks is
    how schedules are, and is not worth a word; that it is in no cell is an error."""
    cells, left_out, why = [], [], dict[str, str]()
    for cell in wanted:
        try:
            cell.program()
        except ScheduleError as error:
            why.setdefault(cell.schedule, str(error))
            if SCHEDULES[cell.schedule].takes(cell.virtual):
                left_out.append(f"{cell}: {error}")
                why[cell.schedule] = str(error)
        else:
            cells.append(cell)
    for name in schedules:
        if all(cell.schedule != name for cell in cells):
            raise UsageError(f"--schedules: nothing is left of {name}: {why[name]}")
    return cells, left_out


# --- Measuring -----------------------------------------------------------------------------------


def _measure(options: Options) -> list[CellResults]:
    """For each pipeline size a crew of each contender, which take steps in turn."""
    rows = [
        CellResults(cell, {name: Steps() for name in options.contenders}) for cell in options.cells
    ]
    seconds = sum(cell.seconds() for cell in options.cells)
    minutes = seconds * len(options.contenders) * options.repeats / 60
    print(f"{len(rows)} cells, {minutes:.1f} minutes or more", file=sys.stderr, flush=True)
    for ranks in dict.fromkeys(cell.ranks for cell in options.cells):
        _measure_size(ranks, [row for row in rows if row.cell.ranks == ranks], options)
    return rows


def _measure_size(ranks: int, rows: Sequence[CellResults], options: Options) -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_directory())
        crews = {}
        for name in options.contenders:
            spec: dict[str, Any] = {"contender": name, "ranks": ranks}
            spec |= {"floats": options.floats, "work": options.work}
            crews[name] = stack.enter_context(Crew(name, ranks, spec, folder, WORKER))
        for crew in crews.values():
            crew.wait_until_ready()
        for row in rows:
            _warm_up(row, crews)
        for repeat in range(options.repeats):
            for row in rows:
                for name, steps in row.contenders.items():
                    if not steps.refused:
                        order = row.cell.order() | {"begin": perf_counter() + NOTICE}
                        steps.add(measured(crews[name].order(order)))
            print(f"p={ranks}: repeat {repeat + 1} of {options.repeats}", file=sys.stderr)


def _warm_up(row: CellResults, crews: dict[str, Crew]) -> None:
    """A step of no time, in which each contender makes what it keeps, or refuses."""
    for name, steps in row.contenders.items():
        answers = crews[name].order(row.cell.order() | {"unit": 0.0, "begin": 0.0})
        steps.refused = answers[0].get("refused")
        if name == "megapipe" and steps.refused:
            raise MegapipeError(f"bench: {row.cell}: {steps.refused}")
