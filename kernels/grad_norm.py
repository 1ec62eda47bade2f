"""The squared norm of a flat buffer, and how many of its elements are not finite, in one pass.

    sum over i of x_i^2,    number of i with x_i infinite or NaN

Reads each element once (4 bytes) and writes next to nothing. A lane of a program adds at most
N / (PROGRAMS * BLOCK) squares in float32, 239 for a billion elements, and then the 4,096 lanes are
added as a tree, at most 16 in a thread and 8 levels above. So the relative error is below
264 * 2^-24 = 1.6e-5 (typically the root of that many roundings, 1e-6). The programs' sums are added
in float64. Always in the same order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapipe.kernels.backend import FP_FUSION, Backend, UnsupportedError, choose
from megapipe.kernels.compilation import Variant

PROGRAMS, BLOCK, WARPS = 1024, 4096, 8
LARGEST = torch.finfo(torch.float32).max


def grad_norm(x: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """x [N], contiguous -> (squared norm, float64; elements that are not finite, int64), scalars.

    Where there are such elements, the norm is infinite or NaN. Raises UnsupportedError for anything
    but float32 in Triton.
    """
    assert x.dim() == 1, "a flat buffer"
    if choose(backend, x) == "torch":
        return torch.linalg.vector_norm(x).double().square(), x.isfinite().logical_not().sum()
    squares: Tensor
    squares, count = torch.ops.megapipe.grad_norm(x)
    return squares, count


@triton.jit
def _grad_norm(  # type: ignore[no-untyped-def]
    x, squares, counts, length, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    """Blocks program, program + programs, ...: one sum and one count."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for block in range(program, tl.cdiv(length, BLOCK), tl.num_programs(0)):
        places = block * tl.cast(BLOCK, tl.int64) + lanes
        values = tl.load(x + places, places < length, other=0)
        total += values * values
        finite = tl.abs(values) <= LARGEST  # false for NaN
        count += tl.where(finite, 0, 1)
    tl.store(squares + program, tl.sum(total, 0))
    tl.store(counts + program, tl.sum(count, 0))


@torch.library.custom_op("megapipe::grad_norm", mutates_args=())
def _launch(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32:
        raise UnsupportedError("grad_norm", f"{str(x.dtype).removeprefix('torch.')} gradients")
    programs = min(PROGRAMS, triton.cdiv(x.numel(), BLOCK))
    squares = torch.empty(programs, dtype=torch.float32, device=x.device)
    counts = torch.empty(programs, dtype=torch.int32, device=x.device)
    if programs:
        _grad_norm[(programs,)](
            x.contiguous(),
            squares,
            counts,
            x.numel(),
            LARGEST=LARGEST,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return squares.sum(dtype=torch.float64), counts.sum()


@_launch.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float64), x.new_empty((), dtype=torch.int64)


def variants() -> Iterator[Variant]:
    """The one there is, for shards of up to and above 2^31 elements."""
    for length in ("i32", "i64"):
        yield Variant(
            _grad_norm,
            f"length {length}",
            signature={"x": "*fp32", "squares": "*fp32", "counts": "*i32", "length": length},
            constants={"LARGEST": LARGEST, "BLOCK": BLOCK},
            num_warps=WARPS,
            divisible=("length",),
        )
