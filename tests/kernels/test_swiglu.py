"""SwiGLU: the Triton kernel against torch and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import Backend, UnsupportedError, swiglu
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)


def gated(x: Tensor, backend: Backend = "triton") -> Tensor:
    return swiglu(x, backend=backend)


def reference(x: Tensor) -> Tensor:
    return swiglu(x, backend="torch")


def input_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def check(x: Tensor) -> None:
    exact = values_and_gradients(reference, [x.double()])
    assert_as_accurate(
        values_and_gradients(gated, [x]), values_and_gradients(reference, [x]), exact
    )


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_as_accurate_as_torch(rows: int, width: int, dtype: torch.dtype) -> None:
    check(input_of(rows, 2 * width, dtype=dtype))


def test_rows_of_several_blocks_in_any_order() -> None:
    x = input_of(2, 3, 2 * 2500)
    check(x)
    kernel = values_and_gradients(gated, [x])
    with programs_in_reverse():
        again = values_and_gradients(gated, [x])
    assert_same_bits(kernel, again)


def test_strides() -> None:
    x = input_of(3, 4, 20)[:, 1:, 4:].transpose(0, 1)
    for own, other in zip(
        values_and_gradients(gated, [x]), values_and_gradients(reference, [x]), strict=True
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 200.0, -200.0])
@pytest.mark.parametrize("column", [1, 11])
def test_not_finite_as_torch(value: float, column: int) -> None:
    x = input_of(3, 20)
    x[1, column] = value
    kernel = values_and_gradients(gated, [x])
    for own, other in zip(kernel, values_and_gradients(reference, [x]), strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        gated(torch.zeros(1, 4, dtype=torch.float64))


def test_operator() -> None:
    x = input_of(3, 16).requires_grad_()
    torch.library.opcheck(torch.ops.megapipe.swiglu, (x,))
