"""How a matrix is divided among a kernel's programs.

`row_tiles` is for kernels that need whole rows at once (norms), `element_tiles` for those that do
not. Both are functions of the width (and dtype) alone: every rank takes the same, and so gets the
same bits.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from megapipe.kernels.backend import UnsupportedError

MAX_COLUMNS = 16384
ELEMENTS = 4096
PROGRAMS = 256
"""Groups of programs of a backward pass. Each adds up the weight gradient of its rows; the number
is fixed, so that the order of that sum depends on nothing but the number of rows."""


@dataclass(frozen=True)
class RowTiles:
    """A program holds `rows` rows of `block` columns (the next power of two): 4096 elements, which
    are 24 KiB of loads in flight in a backward pass in bfloat16, or one row.

    In a backward pass `parts` programs share wide rows: a program has block / parts columns.
    """

    rows: int
    block: int
    parts: int

    @property
    def forward_warps(self) -> int:
        return _warps(self.block)

    @property
    def backward_warps(self) -> int:
        return _warps(self.block // self.parts)

    def forward(self) -> dict[str, Any]:
        """Constants of a kernel with one program for each `rows` rows."""
        return {"ROWS": self.rows, "BLOCK": self.block}

    def backward(self) -> dict[str, Any]:
        """Constants of a kernel with programs that each go through many rows."""
        return {"ROWS": self.rows, "BLOCK": self.block // self.parts, "PARTS": self.parts}

    def forward_grid(self, rows: int) -> tuple[int]:
        return (triton.cdiv(rows, self.rows),)

    def backward_grid(self, rows: int) -> tuple[int, int]:
        """(parts of a row, groups of rows): the parts start together, and so share the cache."""
        return self.parts, min(triton.cdiv(rows, self.rows), PROGRAMS)


def row_tiles(kernel: str, hidden: int, held: int) -> RowTiles:
    """For rows of this width, of which a backward program holds `held` columns at most."""
    if hidden > MAX_COLUMNS:
        raise UnsupportedError(kernel, f"hidden size {hidden} is above {MAX_COLUMNS}")
    block = triton.next_power_of_2(max(1, hidden))
    return RowTiles(max(1, ELEMENTS // block), block, max(1, block // held))


def _warps(columns: int) -> int:
    """16 elements for each thread, more in the widest rows."""
    return min(16, max(8, columns // 512))


ELEMENT_WARPS = 4


def element_tiles(columns: int) -> dict[str, Any]:
    """Constants of a kernel whose program has a tile of 2048 elements, 16 for each thread."""
    block = min(2048, triton.next_power_of_2(columns))
    return {"ROWS": 2048 // block, "BLOCK": block}


def element_grid(rows: int, columns: int) -> tuple[int]:
    """A grid of one dimension (the others end at 65,535): tiles of the first rows come first."""
    tile = element_tiles(columns)
    return (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["BLOCK"]),)


@triton.jit
def _element_tile(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row [ROWS], column [BLOCK], inside [ROWS, BLOCK]) of this program's tile."""
    blocks = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, column, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def _with_residual(x, residual, total, places, inside, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
    """x in float32; with ADD x + residual, rounded as it is stored in `total`: what is normed must
    be what the backward pass finds there."""
    s = tl.load(x + places, inside, other=0).to(tl.float32)
    if ADD:
        s += tl.load(residual + places, inside, other=0).to(tl.float32)
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + places, rounded, inside)
        s = rounded.to(tl.float32)
    return s
