"""Work in forked processes, which share what this one has opened and loaded."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
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


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


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


Results = Callable[[Iterable[Task], Advance], Iterator[Result]]


@contextmanager
def worker_processes(
    work: Callable[[Task, Advance], Result], workers: int
) -> Iterator[Results[Task, Result]]:
    """Gives what makes results of tasks, in no order; it calls `advance` with what `work` says it
    has done. One worker is this process; several are forked at once, before threads are started.

    Raises what `work` raises, and MegapipeError where a process dies.
    """
    if workers == 1:
        yield lambda tasks, advance: (work(task, advance) for task in tasks)
        return
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(_Worker(work, done), os.getpid())
    )
    try:
        pool.submit(os.getpid).result()
        yield partial(_results, pool, workers * AHEAD, done)
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


def _results(
    pool: ProcessPoolExecutor, most: int, done: Any, tasks: Iterable[Any], advance: Advance
) -> Iterator[Any]:
    """Hands out a limited number of tasks at a time, since there may be very many."""
    waiting: set[Future[Any]] = set()
    left, reported = iter(tasks), 0
    while True:
        waiting |= {pool.submit(_do, task) for task in islice(left, most - len(waiting))}
        if not waiting:
            return
        ready, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
        now = done.value
        advance(now - reported)
        reported = now
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
