"""Sum over the rows of a float32 matrix, always in the same order.

What a kernel's programs found each for its own part (a weight gradient, say) is added up here: by
columns, rows in order, so that the result depends on nothing but the values.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapipe.kernels.backend import FP_FUSION
from megapipe.kernels.compilation import Variant

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 32, 64, 4


@triton.jit
def _row_sums(  # type: ignore[no-untyped-def]
    x, out, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """`BLOCK_COLUMNS` columns of all rows."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        places = row[:, None].to(tl.int64) * columns + column[None, :]
        total += tl.load(x + places, (row < rows)[:, None] & inside[None, :], other=0)
    tl.store(out + column, tl.sum(total, 0), inside)


def row_sums(x: Tensor) -> Tensor:
    """x [rows, columns] float32, contiguous -> [columns]; zeros where there are no rows.

    Called inside other custom operators only: it is none itself.
    """
    rows, columns = x.shape
    out = torch.empty(columns, dtype=torch.float32, device=x.device)
    if columns:
        _row_sums[(triton.cdiv(columns, BLOCK_COLUMNS),)](
            x,
            out,
            rows,
            columns,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return out


def variants() -> Iterator[Variant]:
    """The one there is."""
    yield Variant(
        _row_sums,
        "float32",
        signature={"x": "*fp32", "out": "*fp32", "rows": "i32", "columns": "i32"},
        constants={"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS},
        num_warps=WARPS,
        divisible=("columns",),
    )
