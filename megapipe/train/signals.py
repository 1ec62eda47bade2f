"""Asked to stop: a signal sets a flag, the loop saves and leaves after the step it is in."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Schedulers end a job with SIGTERM, Ctrl-C is SIGINT, `sbatch --signal` often sends SIGUSR1."""


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


class StopRequest:
    """While it is entered, the signals of ASKING ask for a stop; the first one is remembered.

    A second SIGINT raises KeyboardInterrupt at once, for whoever does not want to wait for the
    step and the save. `say` is told of the first request. Only the main thread may enter.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._interrupts = 0
        self._say = say
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def reason(self) -> str | None:
        """The name of the signal that asked."""
        return self.signal.name if self.signal else None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._ask) for number in ASKING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.signal is not None:
            return
        self.signal = signal.Signals(number)
        if self._say:
            # From a thread: the step may have been interrupted in the middle of a print.
            again = " Ctrl-C again leaves at once, without saving." * (number == signal.SIGINT)
            text = f"{self.reason}: saving and leaving after this step.{again}"
            threading.Thread(target=self._say, args=(text,), daemon=True).start()
