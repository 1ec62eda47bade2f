"""How tensors differ: in place, shape, dtype and value."""

import math

import pytest
import torch

from megapipe.checkpoint import slices as slices_module
from megapipe.conversion.inspection.difference import (
    TensorDifference,
    common_bytes,
    compare_tensors,
)
from tests.conversion.inspection.samples import Tensors


def test_all_that_can_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices_module.slices, "__defaults__", (4,))
    table = torch.arange(12.0).reshape(3, 4)
    other = table.clone()
    other[1, 2], other[2, 3] = 6.5, -11.0
    first = {"same": table, "values": table, "shape": table, "dtype": table, "here": table}
    second = {
        "same": table.clone(),
        "values": other,
        "shape": table.t(),
        "dtype": table.bfloat16(),
        "there": table,
    }
    done: list[int] = []
    found = compare_tensors(Tensors(first), Tensors(second), done.append)
    assert (found.only_first, found.only_second) == (["here"], ["there"])
    floats = ("float32", "float32")
    both = ((3, 4), (3, 4))
    assert found.tensors == [
        TensorDifference("dtype", both, ("float32", "bfloat16"), 12),
        TensorDifference("same", both, floats, 12),
        TensorDifference("shape", ((3, 4), (4, 3)), floats),
        TensorDifference("values", both, floats, 12, 2, largest=22.0, relative=2.0),
    ]
    assert [one.differs for one in found.tensors] == [True, False, True, True]
    assert sum(done) == common_bytes(Tensors(first), Tensors(second)) == 48 * 4 + 48 + 24
    assert not compare_tensors(Tensors(first), Tensors(first)).differs


def test_bits_decide_within_a_dtype_and_numbers_between_two() -> None:
    a = torch.tensor([math.nan, 0.0, math.inf, 1.0])
    b = torch.tensor([math.nan, -0.0, math.inf, math.nan])
    (one,) = compare_tensors(Tensors({"w": a}), Tensors({"w": b})).tensors
    assert (one.differing, one.largest, one.relative) == (2, 0.0, 0.0)
    (one,) = compare_tensors(Tensors({"w": a}), Tensors({"w": b.double()})).tensors
    assert one.differing == 1
    (one,) = compare_tensors(
        Tensors({"w": torch.tensor([True, False])}), Tensors({"w": torch.tensor([True, True])})
    ).tensors
    assert (one.differing, one.largest) == (1, 1.0)


def test_layers_by_their_numbers_and_weights_first() -> None:
    names = [
        "exp_avg/layers.0.w",
        "weights/layers.10.w",
        "weights/output.weight",
        "weights/layers.2.w",
        "weights/embedding.weight",
    ]
    stored = Tensors(dict.fromkeys(names, torch.zeros(1)))
    found = compare_tensors(stored, stored)
    assert [one.name for one in found.tensors] == [names[at] for at in (4, 3, 1, 2, 0)]
    assert compare_tensors(stored, Tensors({})).only_first == [names[at] for at in (4, 3, 1, 2, 0)]
