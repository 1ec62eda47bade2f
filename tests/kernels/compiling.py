"""All kernels compiled beside the tests, which leave a core idle much of the time."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.interpreter import compiling_environment
from tests.kernels.compile_kernels import UNFIT


@dataclass(frozen=True)
class Compiling:
    """`python -m tests.kernels.compile_kernels`, at work."""

    process: subprocess.Popen[bytes]
    lines: Path
    errors: Path

    @classmethod
    def start(cls, folder: Path) -> "Compiling":
        """In a process of its own: in this one, Triton may be set to interpret. What the tests
        measure comes first, so it gets what time they leave."""
        lines, errors = folder / "rows.jsonl", folder / "errors"
        with lines.open("wb") as stdout, errors.open("wb") as stderr:
            process = subprocess.Popen(
                ["nice", "-n", "19", sys.executable, "-m", "tests.kernels.compile_kernels"],
                env=compiling_environment(),
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        return cls(process, lines, errors)

    def rows(self) -> list[dict[str, Any]]:
        """When it is done."""
        status = self.process.wait()
        assert status in (0, UNFIT), self.errors.read_text()
        return [json.loads(line) for line in self.lines.read_text().splitlines()]

    def stop(self) -> None:
        """If it still works."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
