"""The signals by which users and schedulers ask a process to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (
    signal.SIGTERM,  # schedulers
    signal.SIGINT,  # Ctrl-C
    signal.SIGHUP,  # the terminal was closed
    signal.SIGQUIT,
    signal.SIGUSR1,  # `sbatch --signal`, often
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGXCPU,  # the limit on processor time; it comes again each second
)
"""The signals that ask a training to stop. One that is ignored at the start (nohup) stays so."""


@contextmanager
def interruptible() -> Iterator[None]:
    """For long imports: SIGINT ends the process. As an exception, one of the many packages that
    catch whatever goes wrong in an import of their own may swallow it, and Ctrl-C would be lost."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
