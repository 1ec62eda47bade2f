"""Temporary directories of commands, and the signals that end them."""

import multiprocessing
import os
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megapipe.scratch import scratch_directory
from megapipe.stop_signals import STOP_SIGNALS

FORKS = multiprocessing.get_context("forkserver")
ENDING = [number for number in STOP_SIGNALS if number != signal.SIGINT]  # which raises an exception


def _work(home: Path, connection: Connection, *, ignored: int | None = None) -> None:
    """Stand for a command with two such directories, and a rank that it has forked."""
    tempfile.tempdir = str(home)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)
    with scratch_directory() as outer, scratch_directory() as inner:
        (outer / "file").write_bytes(b"x")
        (inner / "folder").mkdir()
        if (child := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        connection.send((os.waitpid(child, 0)[1], sorted(home.iterdir()) == sorted([outer, inner])))
        connection.recv()
    connection.send([signal.getsignal(number) == signal.SIG_DFL for number in STOP_SIGNALS])


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_that_ends_the_process_leaves_nothing(tmp_path: Path, number: int) -> None:
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=_work, args=(tmp_path, there))
    process.start()
    assert here.recv() == (signal.SIGTERM, True), "a rank's end takes nothing away"
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == -number
    assert list(tmp_path.iterdir()) == []


def test_at_the_end_signals_mean_what_they_meant(tmp_path: Path) -> None:
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=_work, args=(tmp_path, there), kwargs={"ignored": signal.SIGHUP})
    process.start()
    here.recv()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGHUP)
    here.send("leave")
    assert here.recv() == [number != signal.SIGHUP for number in STOP_SIGNALS]
    process.join()
    assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == []
