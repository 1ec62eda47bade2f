"""Work in processes: all results, errors as they were, and no wait for a process that died."""

import os
from collections.abc import Callable

import pytest

from megapipe.data.audit.workers import work_in_processes
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
    found = sorted(work_in_processes(square, range(40), workers, done.append))
    assert found == [task * task for task in range(40)]
    assert sum(done) == sum(range(40))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised(workers: int) -> None:
    with pytest.raises(DataError, match=ODD):
        list(work_in_processes(refuse_odd, range(10), workers, lambda count: None))


def test_a_process_that_dies_ends_the_work() -> None:
    with pytest.raises(MegapipeError, match="--workers"):
        list(work_in_processes(die, range(10), 2, lambda count: None))
