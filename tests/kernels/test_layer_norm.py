"""LayerNorm with and without the residual: the Triton kernel against torch and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import Backend, UnsupportedError, add_layer_norm, layer_norm, row_tiles
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)

EPSILON = 1e-5


def normed(x: Tensor, weight: Tensor, bias: Tensor, backend: Backend = "torch") -> Tensor:
    return layer_norm(x, weight, bias, EPSILON, backend=backend)


def added(
    x: Tensor, r: Tensor, weight: Tensor, bias: Tensor, backend: Backend = "torch"
) -> tuple[Tensor, ...]:
    return add_layer_norm(x, r, weight, bias, EPSILON, backend=backend)


def inputs(rows: int, hidden: int, dtype: torch.dtype, offset: float = 0) -> list[Tensor]:
    """x, residual, weight, bias; the means of x's rows are about `offset` from 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, hidden), (rows, hidden), (hidden,), (hidden,)]
    x, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return [t.to(dtype) for t in (x + offset * torch.randn(rows, 1, generator=generator), *rest)]


def check(function_inputs: list[Tensor]) -> None:
    x, residual, weight, bias = function_inputs
    for function, given_ in ((normed, (x, weight, bias)), (added, (x, residual, weight, bias))):
        kernel = values_and_gradients(lambda *a, f=function: f(*a, backend="triton"), given_)
        reference = values_and_gradients(function, given_)
        exact = values_and_gradients(function, [a.double() for a in given_])
        assert_as_accurate(kernel, reference, exact)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 9),
    hidden=st.integers(4, 300),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_as_accurate_as_torch(rows: int, hidden: int, dtype: torch.dtype) -> None:
    check(inputs(rows, hidden, dtype))


def test_rows_far_from_zero() -> None:
    """mean(s^2) - mean(s)^2 would lose 13 of 24 bits here."""
    check(inputs(32, 256, torch.float32, offset=100))


@pytest.mark.parametrize(("hidden", "dtype"), [(16384, torch.float32), (12290, torch.float16)])
def test_a_row_shared_by_programs(hidden: int, dtype: torch.dtype) -> None:
    check(inputs(2, hidden, dtype))


def test_few_columns() -> None:
    """Many rows: the error in a row of three columns is luck."""
    check(inputs(64, 3, torch.float32))


def test_one_column_is_its_bias() -> None:
    """What is left of a row of one column is exactly 0: no error to compare."""
    x, _, weight, bias = inputs(3, 1, torch.float32)
    assert_same_bits([normed(x, weight, bias, "triton")], [bias.expand(3, 1)])


def test_more_rows_than_programs_and_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tiles, "PROGRAMS", 3)  # of 2, a sum has no order
    monkeypatch.setattr(row_tiles, "ELEMENTS", 128)
    given_ = inputs(7, 33, torch.float32)
    check(given_)
    kernel = values_and_gradients(lambda *a: added(*a, backend="triton"), given_)
    with programs_in_reverse():
        again = values_and_gradients(lambda *a: added(*a, backend="triton"), given_)
    assert_same_bits(kernel, again)


def test_strides_and_more_dimensions() -> None:
    x = inputs(12, 20, torch.float32)[0].view(3, 4, 20)[:, 1:, 4:].transpose(0, 1)
    weight, bias = torch.rand(16), torch.rand(32)[::2]
    torch.testing.assert_close(normed(x, weight, bias, "triton"), normed(x, weight, bias))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_as_torch(value: float) -> None:
    x, _, weight, bias = inputs(3, 20, torch.float32)
    x[1, 7] = value
    kernel = values_and_gradients(lambda *a: normed(*a, backend="triton"), (x, weight, bias))
    for own, other in zip(kernel, values_and_gradients(normed, (x, weight, bias)), strict=True):
        assert torch.equal(own.isfinite(), other.isfinite())


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match=r'hidden size 16385 .*train\.kernels = "torch"'):
        normed(torch.zeros(1, 16385), torch.zeros(16385), torch.zeros(16385), "triton")
    with pytest.raises(UnsupportedError, match="float64"):
        normed(torch.zeros(1, 4).double(), torch.zeros(4), torch.zeros(4), "triton")


@pytest.mark.parametrize("residual", [False, True])
def test_operator(residual: bool) -> None:
    x, r, weight, bias = (t.requires_grad_() for t in inputs(3, 16, torch.float32))
    arguments = (x, r if residual else None, weight, bias, EPSILON)
    torch.library.opcheck(torch.ops.megapipe.layer_norm, arguments)
