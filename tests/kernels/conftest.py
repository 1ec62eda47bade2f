"""Every interpreted launch of every test here is checked for accesses outside its tensors."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interpreter import interpreting, needs_interpreter
from tests.kernels.proof import accesses_checked

NOTHING_LAUNCHED = ("test_compilation.py", "test_launches.py", "test_adding_a_kernel.py")
"""On this machine's CPU, in this process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests here that launch kernels need the interpreter, if not a GPU."""
    for item in items:
        here = item.path.parent == Path(__file__).parent
        if here and item.path.name not in NOTHING_LAUNCHED and not item.get_closest_marker("gpu"):
            item.add_marker(needs_interpreter)


@pytest.fixture(scope="package", autouse=True)
def _accesses_checked() -> Iterator[None]:
    if not interpreting:
        yield
        return
    with accesses_checked():
        yield
