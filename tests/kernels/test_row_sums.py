"""Sums over rows: the Triton kernel against torch and float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.kernels.row_sums import row_sums
from tests.kernels.proof import assert_as_accurate, assert_same_bits, programs_in_reverse


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 130), columns=st.integers(20, 200))
def test_as_accurate_as_torch(rows: int, columns: int) -> None:
    """Several blocks of rows and of columns; at least 20 numbers, of fewer the errors are luck."""
    x = matrix(rows, columns)
    assert_as_accurate([row_sums(x)], [x.sum(0)], [x.double().sum(0)])


def test_any_order_and_no_columns() -> None:
    x = matrix(70, 130)
    in_order = row_sums(x)
    with programs_in_reverse():
        assert_same_bits([in_order], [row_sums(x)])
    assert row_sums(x[:, :0]).shape == (0,)


def test_a_nan_stays_in_its_column() -> None:
    x = matrix(40, 70)
    x[35, 66] = torch.nan
    assert row_sums(x).isnan().nonzero().tolist() == [[66]]
