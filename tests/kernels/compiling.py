"""All kernels compiled beside the tests, once for all workers of pytest-xdist."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.interpreter import compiling_environment
from tests.kernels.compile_kernels import UNFIT

WAITING = "tests/kernels/test_compilation.py"
"""The file whose tests wait for the compiler."""

PROGRAM = """\
"$0" -m tests.kernels.compile_kernels >"$1/rows.jsonl" 2>"$1/errors"
echo $? >"$1/part" && mv "$1/part" "$1/status"
"""
"""`status` is there when the rows are complete."""


class Compiling:
    """The results of the compiler, in a folder in which any process may wait for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self) -> list[dict[str, Any]]:
        """When it is done."""
        status = self.folder / "status"
        while not status.exists():
            time.sleep(0.1)
        assert int(status.read_text()) in (0, UNFIT), (self.folder / "errors").read_text()
        lines = (self.folder / "rows.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


class Compiler:
    """`python -m tests.kernels.compile_kernels`, started by the process that ends last: pytest, or
    where pytest-xdist is at work its controller."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="megapipe-compiled-")
        self.folder = Path(self._temporary.name)
        self._process: subprocess.Popen[bytes] | None = None

    def start_for(self, ids: Sequence[str]) -> None:
        """Start it, if one of these tests waits for it and it has not been started.

        It is a process of its own: in this one, Triton may be set to interpret. What the tests
        measure comes first, so it gets what time they leave."""
        if self._process is not None or not any(name.startswith(WAITING) for name in ids):
            return
        self._process = subprocess.Popen(
            ["nice", "-n", "19", "sh", "-c", PROGRAM, sys.executable, str(self.folder)],
            env=compiling_environment(),
            start_new_session=True,
        )

    def stop(self) -> None:
        """End it, if it still works, and remove the results."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self._temporary.cleanup()
