"""The table of dtypes, beside what torch says of them."""

import pytest
import torch

from megapipe.precision import PRECISIONS


@pytest.mark.parametrize("name", PRECISIONS)
def test_names_dtypes_and_bytes_agree(name: str) -> None:
    precision = PRECISIONS[name]
    assert str(precision.model_dtype) == f"torch.{precision.model}"
    assert str(precision.main_dtype) == f"torch.{precision.main}"
    assert precision.model_bytes == precision.model_dtype.itemsize
    assert precision.main_bytes == precision.main_dtype.itemsize
    assert precision.has_master == (precision.model_dtype != precision.main_dtype)


def test_bf16_keeps_sums_in_float32() -> None:
    bf16 = PRECISIONS["bf16"]
    assert (bf16.model_dtype, bf16.main_dtype) == (torch.bfloat16, torch.float32)
