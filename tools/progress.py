"""A bar on standard error for long work: share done, rate, time that remains."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Bar = Iterator[Callable[[int], None]]


@contextmanager
def bytes_bar(what: str, total: int) -> Bar:
    """Show `what` while it goes on; gives what is called with each number of bytes done. Only on a
    terminal: elsewhere nothing is printed."""
    yield from _bar(what, total, DownloadColumn(), TransferSpeedColumn())


@contextmanager
def count_bar(what: str, total: int) -> Bar:
    """As `bytes_bar`, for work over things that are counted."""
    yield from _bar(what, total, MofNCompleteColumn())


def _bar(what: str, total: int, *amounts: ProgressColumn) -> Bar:
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
