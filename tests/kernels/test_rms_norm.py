"""RMSNorm with and without the residual: the Triton kernel against torch and float64."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import Backend, UnsupportedError, add_rms_norm, rms_norm, row_tiles
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)

EPSILON = 1e-5


def normed(x: Tensor, weight: Tensor, backend: Backend = "torch") -> Tensor:
    return rms_norm(x, weight, EPSILON, backend=backend)


def added(x: Tensor, r: Tensor, weight: Tensor, backend: Backend = "torch") -> tuple[Tensor, ...]:
    return add_rms_norm(x, r, weight, EPSILON, backend=backend)


def inputs(rows: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, hidden), (rows, hidden), (hidden,)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 9),
    hidden=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_as_accurate_as_torch(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual, weight = inputs(rows, hidden, dtype)
    for function, given_ in ((normed, (x, weight)), (added, (x, residual, weight))):
        kernel = values_and_gradients(lambda *a, f=function: f(*a, backend="triton"), given_)
        reference = values_and_gradients(function, given_)
        exact = values_and_gradients(function, [a.double() for a in given_])
        assert_as_accurate(kernel, reference, exact)


@pytest.mark.parametrize(("hidden", "dtype"), [(16384, torch.float32), (12290, torch.float16)])
def test_a_row_shared_by_programs(hidden: int, dtype: torch.dtype) -> None:
    x, residual, weight = inputs(2, hidden, dtype)
    kernel = values_and_gradients(lambda *a: added(*a, backend="triton"), (x, residual, weight))
    reference = values_and_gradients(added, (x, residual, weight))
    exact = values_and_gradients(added, [a.double() for a in (x, residual, weight)])
    assert_as_accurate(kernel, reference, exact)


def test_a_row_shared_by_four_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["megapipe.kernels.rms_norm"], "HELD", 16)
    given_ = inputs(5, 50, torch.float32)
    kernel = values_and_gradients(lambda *a: added(*a, backend="triton"), given_)
    exact = values_and_gradients(added, [a.double() for a in given_])
    assert_as_accurate(kernel, values_and_gradients(added, given_), exact)


def test_more_rows_than_programs_and_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tiles, "PROGRAMS", 3)  # of 2, a sum has no order
    monkeypatch.setattr(row_tiles, "ELEMENTS", 128)  # 2 rows of 33 columns
    given_ = inputs(7, 33, torch.float32)
    kernel = values_and_gradients(lambda *a: added(*a, backend="triton"), given_)
    exact = values_and_gradients(added, [a.double() for a in given_])
    assert_as_accurate(kernel, values_and_gradients(added, given_), exact)
    with programs_in_reverse():
        again = values_and_gradients(lambda *a: added(*a, backend="triton"), given_)
    assert_same_bits(kernel, again)


def test_strides_and_more_dimensions() -> None:
    x = inputs(12, 20, torch.float32)[0].view(3, 4, 20)[:, 1:, 4:].transpose(0, 1)
    weight = torch.rand(16)
    torch.testing.assert_close(normed(x, weight, "triton"), normed(x, weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_as_torch(value: float) -> None:
    x, _, weight = inputs(3, 20, torch.float32)
    x[1, 7] = value
    kernel = values_and_gradients(lambda *a: normed(*a, backend="triton"), (x, weight))
    for own, other in zip(kernel, values_and_gradients(normed, (x, weight)), strict=True):
        assert torch.equal(own.isfinite(), other.isfinite())


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match=r'hidden size 16385 .*train\.kernels = "torch"'):
        normed(torch.zeros(1, 16385), torch.zeros(16385), "triton")
    with pytest.raises(UnsupportedError, match="float64"):
        normed(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(4).double(), "triton")


@pytest.mark.parametrize("residual", [False, True])
def test_operator(residual: bool) -> None:
    x, r, weight = inputs(3, 16, torch.float32)
    leaves = [t.requires_grad_() for t in (x, r, weight)]
    arguments = (leaves[0], leaves[1] if residual else None, leaves[2], EPSILON)
    torch.library.opcheck(torch.ops.megapipe.rms_norm, arguments)
