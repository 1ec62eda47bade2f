"""Arguments come as values that can be printed and compared, however they were saved."""

import pytest

from megapipe.conversion.megatron.plain import plain_arguments
from megapipe.conversion.megatron.records import InertRecord


def test_a_namespace_and_a_dict_are_the_same() -> None:
    fields = {"a": 1, "b": [1.5, None, {"c": (True,)}]}
    expected = {"a": 1, "b": [1.5, None, {"c": [True]}]}
    assert plain_arguments(fields) == expected
    assert plain_arguments(InertRecord("argparse", "Namespace", (), fields)) == expected


@pytest.mark.parametrize("other", [None, 3, [1], InertRecord("a", "B", (), 3)])
def test_anything_else_has_no_arguments(other: object) -> None:
    assert plain_arguments(other) == {}


def test_objects_are_shown() -> None:
    kind = InertRecord("a.b", "Kind")
    made = InertRecord("a.b", "Kind", (1, "x", [2]))
    found = plain_arguments(
        {"kind": kind, "made": made, "raw": b"x", "f": InertRecord("torch", "half")}
    )
    assert found == {
        "kind": "a.b.Kind",
        "made": "a.b.Kind(1, 'x', ...)",
        "raw": "<bytes>",
        "f": "half",
    }


def test_lists_without_end_end() -> None:
    endless: list[object] = []
    endless.append(endless)
    wide: list[object] = [0] * 20_000
    for _ in range(5):
        wide = [wide] * 20_000
    found = plain_arguments({"endless": endless, "wide": wide, "last": 1})
    assert found["endless"] == [[[["<list>"]]]]
