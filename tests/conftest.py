"""Set up before any test module is imported."""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked ranks hang on a parent's thread pool

import pytest

from tests.ranks import POOL


@pytest.fixture(scope="session", autouse=True)
def _ranks() -> Iterator[None]:
    yield
    POOL.close()
