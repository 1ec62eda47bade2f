"""Temporary directories that are gone with the command, also when a signal ends it."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megapipe.stop_signals import STOP_SIGNALS


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A temporary directory of this process; forks of it may use it, and leave it there.

    While it lasts, one of STOP_SIGNALS that would end the process at once removes it first. Main
    thread only.
    """
    with tempfile.TemporaryDirectory(prefix="megapipe-") as folder:
        remover = _Remover(folder)
        remover.take_signals()
        try:
            yield Path(folder)
        finally:
            remover.give_back_signals()


class _Remover:
    """Handles signals: removes its directory, then ends the process by the same signal."""

    def __init__(self, folder: str) -> None:
        self._folder, self._owner = folder, os.getpid()
        self._previous: dict[int, Any] = {}

    def take_signals(self) -> None:
        for number in STOP_SIGNALS:
            previous = signal.getsignal(number)
            if previous == signal.SIG_DFL or isinstance(previous, _Remover):
                self._previous[number] = signal.signal(number, self)

    def give_back_signals(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) is self:  # else someone else has taken it over
                signal.signal(number, previous)

    def __call__(self, number: int, frame: object) -> None:
        if os.getpid() == self._owner:
            shutil.rmtree(self._folder, ignore_errors=True)
        previous = self._previous[number]
        if isinstance(previous, _Remover):
            previous(number, frame)
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
