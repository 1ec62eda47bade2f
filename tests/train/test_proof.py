"""The parts of the proof that need no layout; tests/test_layouts.py runs it whole."""

import math

import pytest
import torch

from megapipe.train.proof import _largest_error, relative_error
from tests.host_sync import DEVICE


def test_values_on_a_device_are_compared_with_the_reference_from_a_file() -> None:
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert _largest_error(torch.tensor([1.0, 2.0, 3.5]).double(), expected) == 0.5
    on_device = torch.empty(3, dtype=torch.float64, device=DEVICE)
    assert _largest_error(on_device, expected).device == DEVICE
    with pytest.raises(RuntimeError, match="device"):  # which is why it is moved
        on_device - expected


def test_a_loss_of_zero_has_a_relative_error() -> None:
    """That of a model of one token."""
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(2e-15, 0.0) == 2e-15 / 1e-6
    assert relative_error(5.5, 5.0) == pytest.approx(0.1)
    assert math.isnan(relative_error(math.nan, 5.0))
    assert math.isnan(relative_error(5.0, math.nan))
