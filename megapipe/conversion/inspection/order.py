"""The order in which tensors are listed. No torch."""

import re

NUMBER = re.compile(r"([0-9]+)")


def listing_order(name: str) -> tuple[str, list[tuple[int, str]]]:
    """A key to sort names of tensors by: weights before what an optimizer keeps of them, and layer
    2 before layer 10."""
    kind, slash, _ = name.partition("/")
    parts = NUMBER.split(name)  # every second is a number, of which the shorter is the smaller
    return (
        kind if slash and kind != "weights" else "",
        [(len(part) * (at % 2), part) for at, part in enumerate(parts)],
    )
