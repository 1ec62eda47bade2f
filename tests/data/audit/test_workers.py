"""Work in processes: all results, errors as they were, and no wait for a process that died."""

import os
from collections.abc import Callable

import pytest

from megapipe.data.audit.workers import worker_processes
from megapipe.errors import DataError, MegapipeError

ODD = "the task is odd"


def square(task: int, advance: Callable[[int], None]) -> int:
    advance(task)
    return task * task


def refuse_odd(task: int, advance: Callable[[int], None]) -> int:
    if task % 2:
        raise DataError(ODD)
    return task


def die(task: int, advance: Callable[[int], None]) -> int:
    os._exit(9)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_results_and_all_that_was_done(workers: int) -> None:
    done: list[int] = []
    with worker_processes(square, workers) as results:
        found = sorted(results(range(40), done.append))
    assert found == [task * task for task in range(40)]
    assert sum(done) == sum(range(40))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised(workers: int) -> None:
    with pytest.raises(DataError, match=ODD), worker_processes(refuse_odd, workers) as results:
        list(results(range(10), lambda count: None))


def test_a_process_that_dies_ends_the_work() -> None:
    with pytest.raises(MegapipeError, match="--workers"), worker_processes(die, 2) as results:
        list(results(range(10), lambda count: None))
