"""Parameters that layers ask for by name: which shards one holds, and that none is made twice."""

import pytest

from megapipe.layout.parameters import Init, ParameterSpec, Split, shard_of
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.parameter import StageParameters
from tests.tensor_parallel.samples import CPU, FLOAT64


def parameters(*names: str) -> StageParameters:
    """Matrices of 3 columns; each has one row more than the one before."""
    shards = {}
    for rows, name in enumerate(names, 1):
        spec = ParameterSpec(name, (rows, 3), (0,), Init("zeros"), Role.MATRIX, Split(0))
        shards[name] = shard_of(spec, tensor_rank=0, tensor_size=1, sequence_parallel=False)
    return StageParameters(shards, dtype=FLOAT64, device=CPU)


def test_shards_are_stacked_in_the_order_of_the_names() -> None:
    table = parameters("a", "b", "c")
    stack = table.get("c", "a")
    assert stack.shape == (4, 3)
    assert [(shard.name, shard.row) for shard in stack.shards] == [("c", 0), ("a", 3)]
    assert table.get("c", "a") is stack
    assert table.missing == ["b"]
    assert table.get("b") is table.get("b") is not stack


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("a", "b"), ("b",)),
        (("a", "b"), ("a",)),
        (("a", "b"), ("b", "a")),
        (("a",), ("a", "b")),
        (("b",), ("a", "b")),
        (("a", "b"), ("b", "c")),
    ],
)
def test_a_shard_is_in_one_parameter_only(first: tuple[str, ...], then: tuple[str, ...]) -> None:
    table = parameters("a", "b", "c")
    table.get(*first)
    with pytest.raises(AssertionError, match="are in one parameter"):
        table.get(*then)
    with pytest.raises(AssertionError, match="are in one parameter"):
        table.optional(*then)


def test_optional_parameters_are_all_there_or_none() -> None:
    table = parameters("a", "b")
    assert table.optional("x", "y") is None
    assert table.optional("a", "b") is table.get("a", "b")
    for names in (("a", "x"), ("x", "a")):
        with pytest.raises(AssertionError, match=r"the model has \['a'\] alone"):
            table.optional(*names)
