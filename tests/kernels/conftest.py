"""Every interpreted launch of every test here is checked for accesses outside its tensors."""

import os
from collections.abc import Iterator

import pytest

from tests.kernels.proof import accesses_checked


@pytest.fixture(scope="package", autouse=True)
def _accesses_checked() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    with accesses_checked():
        yield
