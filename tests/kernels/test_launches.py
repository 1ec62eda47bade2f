"""Launches work outside the interpreter: see launches.py."""

import subprocess
import sys

from megapipe.tools.compile_kernels import _variants, kernel_modules
from tests.interpreter import compiling_environment


def test_every_kernel_can_be_launched() -> None:
    """In a process of its own: in this one Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launches"],
        env=compiling_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    launched = {line.split()[0].strip("_") for line in done.stdout.splitlines()}
    assert launched == {v.name for module in kernel_modules() for v in _variants(module)}
