"""A terminal for a command, with nobody at it: what is printed is read, and it may be closed."""

import contextlib
import os
import select
import threading

PAUSE = 0.02


class Terminal:
    """`name` is the device to open. What programs print there is kept until `close`."""

    def __init__(self) -> None:
        self._ours, self._theirs = os.openpty()
        self.name = os.ttyname(self._theirs)
        self._shown = b""
        self._hung_up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def hang_up(self) -> None:
        """Close the window: its programs get SIGHUP, and can't print any more."""
        self._hung_up.set()
        self._reader.join()

    def close(self) -> bytes:
        """What was shown until all programs were gone. Line ends are those of a file again."""
        os.close(self._theirs)
        self._reader.join()
        return self._shown.replace(b"\r\n", b"\n")

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while not self._hung_up.is_set():
                ready, _, _ = select.select([self._ours], [], [], PAUSE)
                if ready:
                    self._shown += os.read(self._ours, 1 << 16)
        os.close(self._ours)
