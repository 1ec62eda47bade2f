"""Launches work outside the interpreter: see launches.py."""

import subprocess
import sys

from tests.interpreter import compiling_environment
from tests.kernels.compile_kernels import kernel_modules, variants_of


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
    assert launched == {v.name for module in kernel_modules() for v in variants_of(module)}
