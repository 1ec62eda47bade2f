"""Every launch of every test here is checked for accesses outside its tensors."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.proof import accesses_checked


@pytest.fixture(scope="package", autouse=True)
def _accesses_checked() -> Iterator[None]:
    if torch.cuda.is_available():  # nothing is interpreted there
        yield
        return
    with accesses_checked():
        yield
