"""`megapipe inspect CHECKPOINT|RUN_DIR`: what is in a checkpoint, and is it whole."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from megapipe.amounts import counted
from megapipe.checkpoint.steps import committed
from megapipe.checkpoint.summary import (
    CheckpointSummary,
    ListedCheckpoint,
    find_checkpoints,
    list_checkpoints,
    summarize_checkpoint,
)
from megapipe.errors import UsageError
from megapipe.tools.arguments import Parser, path_argument

MAX_PROBLEMS = 20


def run(argv: Sequence[str]) -> int:
    """Print a summary of a checkpoint or a list of a run's; 1 if any of it is damaged."""
    arguments, _ = _parser().parse(argv)
    path: Path = arguments.path
    read: bool = arguments.verify
    root = find_checkpoints(path)
    if root is None:
        return _print_checkpoint(
            summarize_checkpoint(path, read=read), tensors=arguments.tensors, read=read
        )
    if arguments.tensors:
        newest = next(iter(committed(root).values()))
        raise UsageError(f"--tensors lists those of one checkpoint, such as {newest}")
    return _print_run(root, list_checkpoints(root, read=read), read=read)


def _parser() -> Parser:
    parser = Parser(
        "inspect", "Say what a checkpoint holds and whether it is whole. Exit status 1 if not."
    )
    parser.add_argument(
        "path", type=path_argument, help="a checkpoint, or a run directory to list all of"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="look only at the manifest and the sizes of the files, not at their bytes",
    )
    return parser


def _print_run(root: Path, checkpoints: Sequence[ListedCheckpoint], *, read: bool) -> int:
    table = Table("step", "tokens", "bytes", "whole")
    for one in checkpoints:
        whole = "DAMAGED" if one.problems else _verdict(read)
        table.add_row(str(one.step), _text(one.tokens), one.size, whole)
    console = _console()
    console.print(_text(str(root)), table)
    return _print_problems(console, [problem for one in checkpoints for problem in one.problems])


def _print_checkpoint(found: CheckpointSummary, *, tensors: bool, read: bool) -> int:
    facts = Table(show_header=False, box=None)
    for name, value in found.facts:
        facts.add_row(_text(name), _text(value))
    facts.add_row("whole", "NO" if found.problems else _verdict(read))
    console = _console()
    console.print(_text(str(found.path)), facts)
    status = _print_problems(console, found.problems)
    if tensors:
        table = Table(Column("tensor", overflow="fold"), "dtype", "shape", "chunks")
        for one in found.tensors:
            table.add_row(_text(one.name), one.dtype, _text(str(list(one.shape))), str(one.chunks))
        console.print(table)
    return status


def _print_problems(console: Console, problems: Sequence[str]) -> int:
    """Returns the exit status."""
    for problem in problems[:MAX_PROBLEMS]:
        console.print(_text(problem, style="red"))
    if len(problems) > MAX_PROBLEMS:
        console.print(f"and {counted(len(problems) - MAX_PROBLEMS, 'more problem')}")
    return 1 if problems else 0


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _text(value: str, style: str = "") -> Text:
    """Text as it is: no markup, and nothing that a terminal would obey."""
    return Text(value if value.isprintable() else ascii(value), style=style)


def _verdict(read: bool) -> str:
    return "yes, every byte verified" if read else "sizes agree, bytes not read"
