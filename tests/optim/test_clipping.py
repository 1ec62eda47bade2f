"""Gradients are scaled down to the limit and never up."""

import math

import pytest

from megapipe.optim.clipping import clip_factor


@pytest.mark.parametrize(
    ("norm", "limit", "factor"),
    [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0)],
)
def test_the_factor(norm: float, limit: float, factor: float) -> None:
    assert clip_factor(norm, limit) == factor


def test_a_norm_that_is_no_number_is_not_clipped() -> None:
    """The step is refused for it, and not here."""
    assert clip_factor(math.nan, 1.0) == 1.0
