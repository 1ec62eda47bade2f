"""The signals that ask for a stop, and Ctrl-C during long imports."""

import signal
from collections.abc import Iterator

import pytest

from megapipe.stop_signals import STOP_SIGNALS, interruptible


@pytest.fixture(autouse=True)
def _handler_is_put_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_signals_that_end_jobs_ask() -> None:
    """Of schedulers, terminals, `sbatch --signal` and `ulimit -t`."""
    assert {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"} <= {
        number.name for number in STOP_SIGNALS
    }


def test_an_interrupt_ends_the_process_meanwhile() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with interruptible():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_somebody_elses_stays() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
