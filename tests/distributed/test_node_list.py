"""Slurm's short forms of nodes and tasks."""

import pytest

from megapipe.distributed.node_list import expand_counts, expand_nodes, place_tasks


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("gpu[007-009,020],cpu1", "gpu007 gpu008 gpu009 gpu020 cpu1"),
        ("n[3,5]", "n3 n5"),
        ("n[9-11]", "n9 n10 n11"),
        (
            "rack[0-1]node[01-02]-ib",
            "rack0node01-ib rack0node02-ib rack1node01-ib rack1node02-ib",
        ),
    ],
)
def test_nodes(nodes: str, names: str) -> None:
    assert expand_nodes(nodes) == names.split()


@pytest.mark.parametrize(
    "nodes",
    [
        "",
        "n1,",
        "n[1-x]",
        "n[]",
        "n[1-3",
        "n[1-]",
        "n[3-1]",
        "n[-1]",
        "n[٣]",
        "n[0-9999999]",
        pytest.param(f"n[{'9' * 5000}]", id="long"),
    ],
)
def test_what_is_no_list_of_nodes(nodes: str) -> None:
    with pytest.raises(ValueError):
        expand_nodes(nodes)


def test_counts() -> None:
    assert expand_counts("4(x2),3") == [4, 4, 3]
    assert expand_counts("8") == [8]
    with pytest.raises(ValueError, match="4,x"):
        expand_counts("4,x")
    with pytest.raises(ValueError, match="x99999999"):
        expand_counts("4(x99999999)")


@pytest.mark.parametrize(
    ("distribution", "hosts"),
    [
        ("", "a a a b c c"),
        ("block:cyclic", "a a a b c c"),
        ("block,Pack", "a a a b c c"),
        ("cyclic", "a b c a c a"),
        ("plane=2", ""),
        ("arbitrary", ""),
    ],
)
def test_places(distribution: str, hosts: str) -> None:
    assert place_tasks(["a", "b", "c"], [3, 1, 2], distribution) == tuple(hosts.split())


def test_lists_that_do_not_fit_place_nothing() -> None:
    assert place_tasks(["a", "b"], [3], "block") == ()
