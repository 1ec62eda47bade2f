"""Errors that a user can mend, whoever raises them."""

import errno
import os

import pytest

from megapipe.errors import MegapipeError, explained, lost_connection

TORCH = "[enforce fail at gloo/transport/tcp/socket.cc:24] rv != -1. -1 vs -1. socket: "


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left", "a/file"), "a/file: No space left."),
        (
            OSError(errno.EMFILE, "Too many open files", "a/file"),
            "a/file: Too many open files. Raise the limit on open files (ulimit -n).",
        ),
        (
            RuntimeError(TORCH + os.strerror(errno.EMFILE)),
            "Too many open files, for torch. Raise the limit on open files (ulimit -n).",
        ),
    ],
)
def test_the_user_is_told_what_to_do(error: Exception, said: str) -> None:
    found = explained(error)
    assert isinstance(found, MegapipeError)
    assert str(found) == said


def test_faults_of_the_program_are_not_explained() -> None:
    assert explained(RuntimeError(TORCH + "Bad file descriptor")) is None
    assert explained(KeyError("open files")) is None
    assert explained(OSError("raised by Python code, without a number")) is None


def test_calls_that_do_not_fit_together_are_no_lost_connection() -> None:
    closed = "[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"
    assert lost_connection(RuntimeError(closed)) == "Connection closed by peer [127.0.0.1]:5"
    unfit = "[enforce fail at /gloo/transport/tcp/pair.cc:476] op.preamble.length <= op.nbytes"
    assert lost_connection(RuntimeError(unfit)) is None
