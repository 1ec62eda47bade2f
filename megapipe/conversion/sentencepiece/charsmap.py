"""Tables of replaced characters, as the `Precompiled` normaliser of `tokenizers` reads them.

The format is sentencepiece's: the size of a double-array trie over UTF-8 bytes, the trie (units of
32 bits), and what the keys become, each ended by a zero byte.
"""

import base64
import struct
from collections.abc import Mapping
from typing import Any

ROOT = 256  # where the children of the root lie; each has the number ROOT ^ its byte
BLOCK = 64  # children of the other nodes: the bytes 0x80 to 0xBF, which go on with a character
HAS_LEAF, IS_VALUE = 1 << 8, 1 << 31


def precompiled(charsmap: bytes) -> dict[str, Any]:
    """The normaliser of a table, as a part of tokenizer.json."""
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}


def build_charsmap(rules: Mapping[str, str]) -> bytes:
    """The table that replaces single characters, from {character: text}."""
    texts, place = bytearray(), {}
    for text in sorted(set(rules.values())):
        place[text] = len(texts)
        texts += text.encode() + b"\0"
    tree: dict[int, Any] = {}
    for character, text in rules.items():
        node, *last = tree, *character.encode()
        for byte in last[:-1]:
            node = node.setdefault(byte, {})
        node[last[-1]] = place[text]
    units = [0] * (2 * ROOT)
    leaves: list[tuple[int, int]] = []
    _lay_out(tree, 0, ROOT, units, leaves)
    units += [0] * (-len(units) % 256)  # a search looks at any of 256 neighbours
    free = (unit for unit in range(ROOT, len(units)) if not units[unit])
    for unit, value in leaves:
        slot = next(free)
        units[unit] |= (unit ^ slot) << 10 | HAS_LEAF
        units[slot] = value | IS_VALUE
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + bytes(texts)


def _lay_out(
    node: dict[int, Any], unit: int, base: int, units: list[int], leaves: list[tuple[int, int]]
) -> None:
    """Put the children of a node, which is at `unit`, around `base`; leaves wait for a slot."""
    units[unit] |= (unit ^ base) << 10
    for byte, child in node.items():
        place = base ^ byte
        units[place] = byte
        if isinstance(child, dict):
            below = len(units) ^ 0x80
            units += [0] * BLOCK
            _lay_out(child, place, below, units, leaves)
        else:
            leaves.append((place, child))
