"""Squared norm and non-finite count: the Triton kernel against torch and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.kernels import UnsupportedError, grad_norm
from tests.kernels.proof import programs_in_reverse

PER_LANE = 2.0**-24
"""Relative error that a square, and each addition of another in its lane, brings at most."""


@settings(max_examples=20, deadline=None)
@given(length=st.integers(0, 40_000), scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_norm(length: int, scale: float) -> None:
    x = torch.randn(length, generator=torch.Generator().manual_seed(length)) * scale
    squares, count = grad_norm(x, backend="triton")
    exact = x.double().square().sum()
    # One square, at most 10 lanes of one block added, and the tree over 4,096 lanes (12 levels).
    assert abs(squares - exact) <= 25 * PER_LANE * exact
    assert (squares.dtype, count.dtype, int(count)) == (torch.float64, torch.int64, 0)
    assert float(grad_norm(x, backend="torch")[0]) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_not_finite(backend: str) -> None:
    x = torch.ones(9000)
    x[[3, 5000, 8999]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    squares, count = grad_norm(x, backend=backend)  # type: ignore[arg-type]
    assert int(count) == 3
    assert not squares.isfinite()
    x[3] = 1
    squares, count = grad_norm(x, backend=backend)  # type: ignore[arg-type]
    assert (float(squares), int(count)) == (torch.inf, 2)


def test_more_blocks_than_programs_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["megapipe.kernels.grad_norm"], "PROGRAMS", 3)
    x = torch.randn(11 * 4096 + 5, generator=torch.Generator().manual_seed(1))
    found = grad_norm(x, backend="triton")
    assert float(found[0]) == pytest.approx(float(x.double().square().sum()), rel=30 * PER_LANE)
    with programs_in_reverse():
        assert found == grad_norm(x, backend="triton")


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="float64 gradients"):
        grad_norm(torch.zeros(3, dtype=torch.float64), backend="triton")


def test_operator() -> None:
    torch.library.opcheck(torch.ops.megapipe.grad_norm, (torch.rand(5000),))
