"""Every interpreted launch of every test here is checked for accesses outside its tensors; and all
kernels are compiled beside the tests, which take one core."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megapipe.tools.compile_kernels import UNFIT
from tests.interpreter import interpreting, needs_interpreter
from tests.kernels.proof import accesses_checked

COMPILATION = "test_compilation.py"
NOTHING_LAUNCHED = (COMPILATION, "test_launches.py", "test_adding_a_kernel.py")
"""On this machine's CPU, in this process."""


@dataclass(frozen=True)
class Compiling:
    """`python -m megapipe.tools.compile_kernels`, at work."""

    process: subprocess.Popen[bytes]
    lines: Path
    errors: Path

    def rows(self) -> list[dict[str, Any]]:
        """When it is done."""
        status = self.process.wait()
        assert status in (0, UNFIT), self.errors.read_text()
        return [json.loads(line) for line in self.lines.read_text().splitlines()]


@pytest.fixture(scope="package")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiling]:
    """In a process of its own: in this one, Triton may be set to interpret."""
    folder = tmp_path_factory.mktemp("compiled")
    lines, errors = folder / "rows.jsonl", folder / "errors"
    with lines.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "megapipe.tools.compile_kernels"],
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    yield Compiling(process, lines, errors)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="package", autouse=True)
def _compiled_beside(request: pytest.FixtureRequest) -> None:
    if any(item.path.name == COMPILATION for item in request.session.items):
        request.getfixturevalue("compiling")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that wait for the compiler come after the others of this folder."""
    here = Path(__file__).parent
    own = [item for item in items if item.path.parent == here]
    for item in own:
        if item.path.name not in NOTHING_LAUNCHED and not item.get_closest_marker("gpu"):
            item.add_marker(needs_interpreter)
    if own:
        first = items.index(own[0])
        own.sort(key=lambda item: item.path.name == COMPILATION)
        items[first : first + len(own)] = own


@pytest.fixture(scope="package", autouse=True)
def _accesses_checked() -> Iterator[None]:
    if not interpreting:
        yield
        return
    with accesses_checked():
        yield
