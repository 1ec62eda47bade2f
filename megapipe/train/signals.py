"""Asked to stop: a signal sets a flag, the loop saves and leaves after the step it is in.

Python runs a signal's handler between two bytecodes of the main thread. A rank that waits for one
that is gone executes none: it sits in a collective, for as long as that has patience. So a thread
hears of signals too (through a pipe that Python writes to at once), and ends the process where no
step ends within some time.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from megapipe.stop_signals import STOP_SIGNALS

LEAST_SECONDS = 60.0
STEPS = 10
"""Without a time of its own, a request waits for this many times the last step, or the least."""
INTERRUPT_SECONDS = 3.0
POLL_SECONDS = 0.1


class StopRequest:
    """While it is entered, the signals of STOP_SIGNALS ask for a stop; the first one is remembered.

    Before `begin` there is nothing to save, and a signal ends the process at once. After it, `say`
    announces the first request, and the loop says by `step_ended`, `alive` and `saving` how it is
    getting on: where none of that is heard for `timeout` seconds (None: see LEAST_SECONDS) after a
    request, the process ends with status 128 + the signal's number. A second SIGINT raises
    KeyboardInterrupt at once, for whoever does not want to wait for the step and the save. Only the
    main thread may enter.
    """

    def __init__(
        self,
        say: Callable[[str], None] | None = None,
        *,
        timeout: float | None = None,
        first: bool = True,
        leave: Callable[[str, int], None] | None = None,
    ) -> None:
        """`first`: this process tells what all of the run's processes hear. `leave` ends the
        process with a line (none where the text is empty) and a status."""
        self.signal: signal.Signals | None = None
        self._say, self._timeout, self._leave = say or _nobody, timeout, leave or leave_at_once
        self._interrupts = 0
        self._first = first
        self._begun = self._told = self._ended = False
        self._saving = 0
        self._heard = time.monotonic()
        self._step_seconds = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def reason(self) -> str | None:
        """The name of the signal that asked."""
        return self.signal.name if self.signal else None

    def begin(self) -> None:
        """From here on there is a loop that looks at `requested`."""
        self.alive()
        self._begun = True

    def end(self) -> None:
        """The loop is over, and what is left to do is not cut short."""
        self._ended = True

    def alive(self) -> None:
        """Something that the ranks do together has ended."""
        self._heard = time.monotonic()

    def step_ended(self, seconds: float) -> None:
        """A step has ended, which took so long."""
        self._step_seconds = seconds
        self.alive()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Nothing cuts a save short, however long it takes."""
        self._saving += 1
        try:
            yield
        finally:
            self._saving -= 1
            self.alive()

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        # None: not Python's; a profiler's timer, say.
        self._previous = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        for number in self._previous:  # last: whatever they get, the thread hears
            signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, when it comes to it."""
        self.signal = self.signal or signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    # --- In the thread ---------------------------------------------------------------------------

    def _watch(self) -> None:
        interrupts, interrupted = 0, float("inf")
        while True:
            if select.select([self._reader], [], [], POLL_SECONDS if self._told else None)[0]:
                numbers = os.read(self._reader, 64)
                if not numbers:
                    return
                for number in numbers:
                    if number in self._previous:
                        self._hear(signal.Signals(number))
                interrupts += numbers.count(signal.SIGINT)
                if interrupts > 1:
                    interrupted = min(interrupted, time.monotonic())
            self._look_at_the_clock(interrupted)

    def _hear(self, number: signal.Signals) -> None:
        self.signal = self.signal or number
        if not self._begun:
            text = f"{self.reason} before the first step: nothing to save."
            self._leave(text if self._first else "", self._status)
        elif not self._told and not self._ended:
            self._told = True
            self.alive()
            again = " Ctrl-C again stops at once, without saving." * (number == signal.SIGINT)
            self._say(f"{self.reason}: saving and stopping after the current step.{again}")

    def _look_at_the_clock(self, interrupted: float) -> None:
        now = time.monotonic()
        if now - interrupted > INTERRUPT_SECONDS:
            self._leave("interrupted", self._status)
        limit = self._timeout or max(LEAST_SECONDS, STEPS * self._step_seconds)
        if self._ended or self._saving or not self._told:
            return
        if now - self._heard > limit:
            self._leave(
                f"{self.reason}, and no step has ended for {limit:.0f} s, as when another rank is "
                "gone. Leaving without a save: the same command goes on from the newest "
                "checkpoint. (train.stop_timeout_seconds sets the time.)",
                self._status,
            )

    @property
    def _status(self) -> int:
        assert self.signal is not None
        return 128 + self.signal


def leave_at_once(text: str, status: int) -> None:
    """End the process with a line, whatever its other threads wait for."""
    with suppress(OSError):  # the console may be gone
        os.write(2, f"megapipe: {text}\n".encode() if text else b"")
    os._exit(status)


def _nobody(text: str) -> None:
    """For requests that nobody has to hear of."""
