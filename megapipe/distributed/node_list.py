"""Slurm's short forms: lists of nodes, and of the number of tasks on each of them."""

import re
from itertools import chain, zip_longest

MOST_NODES = 1_000_000
"""In one part of a list; more is a mistake that would fill the memory."""


def expand_nodes(nodes: str) -> list[str]:
    """All names of a list: `gpu007`, `gpu008` and `cpu1` of `gpu[007-008],cpu1`.

    Raises ValueError for what is no such list.
    """
    return [name for part in re.split(r",(?![^\[]*\])", nodes) for name in _expand(part)]


def _expand(part: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        if not part:
            raise ValueError("a node without a name")
        return [part]
    numbers, end, tail = rest.partition("]")
    if not end:
        raise ValueError(f"no ] in {part}")
    tails = _expand(tail) if tail else [""]
    names: list[str] = []
    for span in numbers.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", span)
        if match is None:
            raise ValueError(f"not a span of numbers: {span!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < MOST_NODES:
            raise ValueError(f"no node or too many: {span!r}")
        for number in range(first, last + 1):
            names += [f"{head}{number:0{len(match[1])}}{end}" for end in tails]
    return names


def expand_counts(counts: str) -> list[int]:
    """`4(x2),3` is 4, 4, 3. Raises ValueError for what is no such list."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None or int(match[2] or 1) > MOST_NODES:
            raise ValueError(counts)
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded


def place_tasks(nodes: list[str], counts: list[int], distribution: str) -> tuple[str, ...]:
    """The node of each task, in their order; empty where that can't be told.

    `distribution` is SLURM_DISTRIBUTION: "block" fills one node after the other, "cyclic" deals the
    tasks out in turn; other ways are not known here. Of "block:cyclic" the first word counts.
    """
    if len(nodes) != len(counts):
        return ()
    rows = [[node] * count for node, count in zip(nodes, counts, strict=True)]
    match distribution.partition(":")[0].partition(",")[0]:
        case "" | "block":
            return tuple(chain.from_iterable(rows))
        case "cyclic":
            return tuple(node for turn in zip_longest(*rows) for node in turn if node is not None)
        case _:
            return ()
