"""Statistics of tensors against torch's, slice by slice, with values that are not finite."""

import math

import pytest
import torch

from megapipe.checkpoint import slices as slices_module
from megapipe.conversion.inspection.statistics import TensorStatistics, statistics_of
from tests.conversion.inspection.samples import Tensors


def test_statistics_are_those_of_the_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices_module.slices, "__defaults__", (7,))
    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(9, 5) - 0.5,
        "bf16": torch.randn(11).bfloat16(),
        "scalar": torch.tensor(-2.5, dtype=torch.float64),
        "ids": torch.tensor([3, -4]),
        "empty": torch.empty(0, 3),
    }
    done: list[int] = []
    found = statistics_of(Tensors(tensors), done.append)
    assert list(found) == list(tensors)
    for name in ("matrix", "bf16", "scalar", "ids"):
        values = tensors[name].double()
        one = found[name]
        assert one.norm == pytest.approx(float(values.norm()), rel=1e-12)
        assert one.mean == pytest.approx(float(values.mean()), rel=1e-12)
        assert one.largest == float(values.abs().max())
        assert (one.nan, one.infinite) == (0, 0)
    assert found["empty"] == TensorStatistics(0.0, 0.0, 0.0, 0, 0)
    assert sum(done) == sum(tensor.nbytes for tensor in tensors.values())


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    values = torch.tensor([3.0, math.nan, -4.0, math.inf, -math.inf, math.nan])
    (found,) = statistics_of(Tensors({"w": values})).values()
    assert found == TensorStatistics(5.0, 4.0, -0.5, nan=2, infinite=2)
    (found,) = statistics_of(Tensors({"w": torch.full((2,), math.nan)})).values()
    assert found == TensorStatistics(0.0, 0.0, 0.0, nan=2, infinite=0)
