"""Work in forked processes, which share what this one has opened and loaded."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Generic, TypeVar

from megapipe.errors import MegapipeError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 4
"""Tasks for each worker that are handed out at once."""
POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1

Advance = Callable[[int], None]


class _Worker(Generic[Task, Result]):
    """What a worker process was begun with. There is one for each process."""

    begun: Any = None

    def __init__(self, work: Callable[[Task, Advance], Result], done: Any) -> None:
        self._work, self._done = work, done

    def do(self, task: Task) -> Result:
        return self._work(task, self._advance)

    def _advance(self, count: int) -> None:
        with self._done.get_lock():
            self._done.value += count


def work_in_processes(
    work: Callable[[Task, Advance], Result], tasks: Iterable[Task], workers: int, advance: Advance
) -> Iterator[Result]:
    """The results of all tasks, in no order. `advance` gets what `work` says it has done.

    One worker is this process. Raises what `work` raises, and MegapipeError where a process dies.
    """
    if workers == 1:
        yield from (work(task, advance) for task in tasks)
        return
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(_Worker(work, done), os.getpid())
    )
    try:
        yield from _results(pool, iter(tasks), workers * AHEAD, _difference(done, advance))
    except BrokenProcessPool as error:
        raise MegapipeError(
            "a worker process was ended from outside, most often for lack of memory: take fewer "
            "with --workers."
        ) from error
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _difference(done: Any, advance: Advance) -> Callable[[], None]:
    """Reports how much more is done than at the last call."""
    reported = 0

    def report() -> None:
        nonlocal reported
        now = done.value
        advance(now - reported)
        reported = now

    return report


def _results(
    pool: ProcessPoolExecutor, tasks: Iterator[Any], most: int, report: Callable[[], None]
) -> Iterator[Any]:
    """Hands out a limited number of tasks at a time, since there may be very many."""
    waiting: set[Future[Any]] = set()
    while True:
        waiting |= {pool.submit(_do, task) for task in islice(tasks, most - len(waiting))}
        if not waiting:
            return
        ready, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
        report()
        yield from (future.result() for future in ready)


def _begin(worker: _Worker[Any, Any], parent: int) -> None:
    """A worker ends with its parent, and at once when it is interrupted."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _Worker.begun = worker


def _do(task: Any) -> Any:
    return _Worker.begun.do(task)
