"""Standard output and standard error that no closed, full or narrow console can break.

Both are written without Python's buffers, so that nothing waits to fail at exit, and what their
encoding can't say is escaped. Where standard output can't be written, a training goes on without
it, and any other command ends with one line, since its output is all that it is for.
"""

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from megapipe.errors import MegapipeError
from megapipe.files import write_all

PIPE_CLOSED = 141  # 128 + SIGPIPE, as shells report it for `| head`


class OutputError(MegapipeError):
    """Standard output can't be written; `reader_left` where it is a pipe whose reader has ended."""

    def __init__(self, error: OSError) -> None:
        self.reader_left = isinstance(error, BrokenPipeError)
        closed = error.errno == errno.EBADF
        why = "it is closed" if closed else error.strerror
        super().__init__(f"standard output can't be written: {why}.")


class _Waiting(threading.local):
    """What a thread has written of a line that is not whole."""

    text = ""


class Stream:
    """Text to a descriptor, a line at a time; a line that can't be written goes to `failed`.

    Later lines are tried again: a disk that was full may have room by then. Threads may share it:
    the lines of each stay whole.
    """

    def __init__(
        self, stream: TextIO | None, descriptor: int, failed: Callable[[OSError], None]
    ) -> None:
        """`stream` is Python's own, None where the descriptor was closed at the start."""
        self.encoding = stream.encoding if stream else "utf-8"
        self.errors = "backslashreplace"
        self._stream, self._descriptor, self._failed = stream, descriptor, failed
        self._lock = threading.RLock()  # again by one thread: `failed` may write too
        self._waiting = _Waiting()

    def write(self, text: str) -> int:
        self._waiting.text += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        if not self._waiting.text:
            return
        data, self._waiting.text = self._waiting.text.encode(self.encoding, self.errors), ""
        with self._lock:
            try:
                write_all(self._descriptor, [data])
            except OSError as error:
                self._failed(error)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True


@contextmanager
def console(*, lasting: bool) -> Iterator[None]:
    """Write to the console through `Stream`s; with `lasting`, its loss is reported and survived.

    Only in place of the process's own streams: a caller that has redirected them keeps them.
    """
    open_closed_descriptors()
    before = sys.stdout, sys.stderr
    if before != (sys.__stdout__, sys.__stderr__):
        yield
        return
    output = Stream(sys.stdout, 1, _Loss() if lasting else _refuse)
    errors = Stream(sys.stderr, 2, lambda error: None)  # there is nowhere to report it
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def open_closed_descriptors() -> None:
    """Occupy 0, 1 and 2 where they were closed at the start: files opened later must not get these
    numbers, or whatever is printed would end up in them. Writing to 1 stays an error."""
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free


def _refuse(error: OSError) -> NoReturn:
    raise OutputError(error) from error


class _Loss:
    """Says once that lines are lost."""

    def __init__(self) -> None:
        self._told = False

    def __call__(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            print(
                f"warning: {OutputError(error)} The training goes on, and metrics.jsonl in its "
                "run directory has every step.",
                file=sys.stderr,
                flush=True,
            )
