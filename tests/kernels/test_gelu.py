"""GELU with and without a bias: the Triton kernel against torch and float64."""

import importlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import UnsupportedError, bias_gelu, gelu
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)


def function(backend: str, approximate: bool) -> Callable[..., Tensor]:
    """Of x, or of x and a bias."""

    def call(x: Tensor, *bias: Tensor) -> Tensor:
        chosen = bias_gelu if bias else gelu
        return chosen(x, *bias, approximate=approximate, backend=backend)  # type: ignore[operator]

    return call


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x from deep in one tail to deep in the other, and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, columns), (columns,)]
    x, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [(2 * x).to(dtype), bias.to(dtype)]


def check(given_: list[Tensor], approximate: bool) -> None:
    kernel, reference = (function(backend, approximate) for backend in ("triton", "torch"))
    exact = values_and_gradients(reference, [a.double() for a in given_])
    assert_as_accurate(
        values_and_gradients(kernel, given_), values_and_gradients(reference, given_), exact
    )


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(2, 100),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    approximate=st.booleans(),
)
def test_as_accurate_as_torch(
    rows: int, columns: int, dtype: torch.dtype, approximate: bool
) -> None:
    given_ = inputs(rows, columns, dtype)
    check(given_, approximate)
    check(given_[:1], approximate)


@pytest.mark.parametrize("approximate", [False, True])
def test_one_column(approximate: bool) -> None:
    """The bias gradient is one number, and whose error in it is smaller is luck."""
    kernel, reference = (
        values_and_gradients(function(backend, approximate), inputs(6, 1))
        for backend in ("triton", "torch")
    )
    for own, other in zip(kernel, reference, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


def test_no_columns() -> None:
    x, bias = torch.zeros(3, 0, requires_grad=True), torch.zeros(0, requires_grad=True)
    y = bias_gelu(x, bias, approximate=True, backend="triton")
    assert y.shape == (3, 0)
    y.sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.shape == (3, 0)


@pytest.mark.parametrize("approximate", [False, True])
def test_every_exponent(approximate: bool) -> None:
    """Each power of two of either sign: y and its slope are torch's, at either end 0 or x."""
    x = 2.0 ** torch.arange(-126, 6).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    kernel, reference = (
        values_and_gradients(function(backend, approximate), [x]) for backend in ("triton", "torch")
    )
    for own, other in zip(kernel, reference, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-6, atol=1e-6)


def test_tail_keeps_its_digits() -> None:
    """The tanh form's small values, whose digits 1 + tanh has lost: torch's in float32 are 6% off
    at -4.5."""
    x = torch.linspace(-4.5, -0.5, 200)
    exact = gelu(x.double(), approximate=True, backend="torch")
    own = gelu(x, approximate=True, backend="triton").double()
    torch.testing.assert_close(own, exact, rtol=4e-6, atol=0)


def test_more_rows_than_groups_and_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of columns, and groups of rows, 3 as of 2 a sum has no order, that go
    through several tiles."""
    module = importlib.import_module("megapipe.kernels.gelu")
    monkeypatch.setattr(module, "_backward_grid", lambda rows, columns, biased: (3, 2))
    given_ = inputs(4, 2100)
    check(given_, True)
    kernel = function("triton", True)
    first = values_and_gradients(kernel, given_)
    with programs_in_reverse():
        assert_same_bits(first, values_and_gradients(kernel, given_))


def test_strides_and_more_dimensions() -> None:
    x, bias = torch.randn(3, 4, 20)[:, 1:, 4:].transpose(0, 1), torch.randn(32)[::2]
    kernel, reference = (
        values_and_gradients(function(backend, False), [x, bias]) for backend in ("triton", "torch")
    )
    for own, other in zip(kernel, reference, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("approximate", [False, True])
def test_not_finite_where_torch_is(value: float, approximate: bool) -> None:
    """torch's exact form gives NaN for infinity, the kernel infinity; all else is as in torch."""
    x, bias = inputs(3, 20)
    x[1, 7] = value
    kernel, reference = (
        values_and_gradients(function(backend, approximate), [x, bias])
        for backend in ("triton", "torch")
    )
    for own, other in zip(kernel, reference, strict=True):
        assert torch.equal(own.isfinite(), other.isfinite())
        finite = other.isfinite()
        torch.testing.assert_close(own[finite], other[finite])


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        gelu(torch.zeros(1, 4, dtype=torch.float64), approximate=True, backend="triton")


@pytest.mark.parametrize("biased", [False, True])
def test_operator(biased: bool) -> None:
    x, bias = (t.requires_grad_() for t in inputs(3, 16))
    torch.library.opcheck(torch.ops.megapipe.gelu, (x, bias if biased else None, False))
