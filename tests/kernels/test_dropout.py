"""Dropout: the Triton kernel keeps exactly what the reference keeps, whoever holds it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import Backend, UnsupportedError, dropout, dropout_add
from megapipe.kernels.dropout import keep_mask
from megapipe.kernels.random import hash32, hash64
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)

SAMPLES = torch.tensor([5, 9, 700_000_000_000, 0])


def mask(p: float, key: int, samples_B: Tensor, length: int, width: int, first: int) -> Tensor:
    """What the kernel keeps, in the form of keep_mask."""
    ones = torch.ones(length, samples_B.numel(), width)
    return dropout(ones, p, key, samples_B, first, backend="triton") != 0


@settings(max_examples=30, deadline=None)
@given(
    p=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.99]),
    key=st.integers(0, 2**63 - 1) | st.integers(0, 2),
    samples=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 9), max_size=4),
    length=st.integers(0, 5),
    width=st.integers(0, 100),
    first=st.integers(0, 2**40) | st.integers(0, 9),
)
def test_same_elements_as_the_reference(
    p: float, key: int, samples: list[int], length: int, width: int, first: int
) -> None:
    samples_B = torch.tensor(samples, dtype=torch.int64)
    assert torch.equal(
        mask(p, key, samples_B, length, width, first),
        keep_mask(p, key, samples_B, length, width, first),
    )


def test_the_last_element_kept() -> None:
    """For each bound that a hash of the row is, the element of that hash is kept, and is not where
    the bound is one less."""
    row = hash64(3, hash64(3, SAMPLES[:1]))
    for column, value in enumerate(hash32(row, 8)[0].tolist()):
        for bound, kept in ((value + 1, True), (value, False)):
            p = 1 - bound / 2**31
            for keep in (mask, keep_mask):
                assert bool(keep(p, 3, SAMPLES[:1], 1, 8, 0)[0, 0, column]) == kept


def test_nothing_is_dropped_with_probability_zero() -> None:
    assert mask(0.0, 3, SAMPLES, 2, 100, 0).all()
    assert keep_mask(0.0, 3, SAMPLES, 2, 100, 0).all()


def test_a_part_has_its_part_of_the_mask() -> None:
    whole = mask(0.3, 11, SAMPLES, 12, 40, 0)
    assert torch.equal(mask(0.3, 11, SAMPLES, 6, 40, 6), whole[6:])
    assert torch.equal(mask(0.3, 11, SAMPLES[1:3], 12, 40, 0), whole[:, 1:3])
    assert not torch.equal(mask(0.3, 12, SAMPLES, 12, 40, 0), whole)


def test_rows_of_several_blocks_in_any_order() -> None:
    expected = keep_mask(0.2, 3, SAMPLES[:2], 2, 4100, 1)
    assert torch.equal(mask(0.2, 3, SAMPLES[:2], 2, 4100, 1), expected)
    with programs_in_reverse():
        assert torch.equal(mask(0.2, 3, SAMPLES[:2], 2, 4100, 1), expected)


def dropped(x: Tensor, backend: Backend = "torch") -> Tensor:
    return dropout(x, 0.3, 8, SAMPLES, 2, backend=backend)


def added(x: Tensor, residual: Tensor, backend: Backend = "torch") -> Tensor:
    return dropout_add(x, residual, 0.3, 8, SAMPLES, 2, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_accurate_as_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, 4, 33, generator=generator).to(dtype) for _ in range(2))
    for function, given_ in ((dropped, (x,)), (added, (x, residual))):
        kernel = values_and_gradients(lambda *a, f=function: f(*a, backend="triton"), given_)
        reference = values_and_gradients(function, given_)
        assert_as_accurate(
            kernel, reference, values_and_gradients(function, [a.double() for a in given_])
        )
        if function is dropped and dtype == torch.float32:
            assert_same_bits(kernel, reference)


def test_strides() -> None:
    x = torch.randn(4, 6, 20)[:, 1:, 4:].transpose(0, 1)
    residual = torch.randn(16, 4, 5).transpose(0, 2)
    torch.testing.assert_close(added(x, residual, "triton"), added(x, residual))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_as_torch(value: float) -> None:
    """Dropped, they are gone."""
    x = torch.full((3, 4, 20), value)
    assert_same_bits([dropped(x, "triton")], [dropped(x)])


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        dropped(torch.zeros(1, 4, 4, dtype=torch.float64), "triton")


@pytest.mark.parametrize("residual", [False, True])
def test_operator(residual: bool) -> None:
    x, r = (torch.randn(3, 4, 16, requires_grad=True) for _ in range(2))
    arguments = (x, r if residual else None, 0.3, 8, SAMPLES, 2)
    torch.library.opcheck(torch.ops.megapipe.dropout, arguments)
