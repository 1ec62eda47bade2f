"""A linear layer's weight gradient, added to the main gradient in the same pass.

    main_grad [out, in] += grad_out [tokens, out]^T inputs [tokens, in]

Narrow factors, float32 sums. The torch reference widens its factors first. Here a program holds a
tile of the sum, adds the main gradient's tile at the end and writes it: 8 bytes a weight. Every
tile is one program's, tokens in order, so the bits never depend on timing.

On CUDA `torch.addmm` with `out_dtype` does the same by cuBLAS: "matmul". `megapipe bench kernels`
compares both.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapipe.kernels.backend import (
    FP_FUSION,
    UnsupportedError,
    backend_of,
    check_dtype,
)
from megapipe.kernels.compilation import Variant

GROUP = 8
"""Rows of tiles that are worked on together, so that their factors are found in the cache."""


WeightGradBackend = Literal["torch", "matmul", "triton"]
"""`Backend`, and "matmul": torch's product of narrow factors that adds to a wide sum, where the
device has one (`matmul_adds`)."""


def add_weight_grad(
    main_grad: Tensor,
    grad_out: Tensor,
    inputs: Tensor,
    *,
    backend: WeightGradBackend | None = None,
) -> None:
    """main_grad [out, in] += grad_out [..., out]^T inputs [..., in], in main_grad's precision.

    Raises UnsupportedError in Triton unless main_grad is float32 and both factors have one dtype.
    """
    grad_out = grad_out.flatten(0, -2)
    inputs = inputs.flatten(0, -2)
    chosen = backend_of(main_grad.device) if backend is None else backend
    if chosen == "triton":
        torch.ops.megapipe.add_weight_grad(main_grad, grad_out, inputs)
    elif main_grad.dtype == grad_out.dtype:
        main_grad.addmm_(grad_out.t(), inputs)
    elif chosen == "matmul":
        _multiply_and_add(main_grad, grad_out, inputs)
    else:
        main_grad.addmm_(grad_out.t().to(main_grad.dtype), inputs.to(main_grad.dtype))


def _multiply_and_add(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> None:
    torch.addmm(main_grad, grad_out.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)


def matmul_adds(
    device: torch.device,
    multiply_and_add: Callable[[Tensor, Tensor, Tensor], None] = _multiply_and_add,
) -> bool:
    """Whether "matmul" adds products of bfloat16 factors to a float32 sum on this device, and
    rounds neither product nor sum to bfloat16. Tries it, and waits for the device."""
    main_grad = torch.full((64, 64), 1 + 2**-10, device=device)
    grad_out, inputs = torch.ones(2, 512, 64, dtype=torch.bfloat16, device=device)
    inputs[0] = 2  # so that the product is 513, for which bfloat16 has too few bits
    try:
        multiply_and_add(main_grad, grad_out, inputs)
    except (RuntimeError, TypeError):  # no such kernel on this device, or no such argument
        return False
    return bool((main_grad == 514 + 2**-10).all())


@triton.jit
def _weight_grad(  # type: ignore[no-untyped-def]
    main_grad,
    grad_out,
    inputs,
    tokens,
    rows,
    columns,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One tile of main_grad [rows, columns]."""
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    down = tl.cdiv(rows, BLOCK_ROWS)
    band = tl.program_id(0) // (GROUP * across)
    within = tl.program_id(0) % (GROUP * across)
    height = min(down - band * GROUP, GROUP)
    row = (band * GROUP + within % height) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (within // height) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    token = tl.arange(0, BLOCK_TOKENS)
    # Read already transposed: a tile transposed after its load is not loaded ahead on sm_80.
    left = grad_out + token[None, :] * tl.cast(rows, tl.int64) + row[:, None]
    right = inputs + token[:, None] * tl.cast(columns, tl.int64) + column[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, tokens, BLOCK_TOKENS):
        there = first + token < tokens
        g = tl.load(left, there[None, :] & (row < rows)[:, None], other=0)
        x = tl.load(right, there[:, None] & (column < columns)[None, :], other=0)
        total = tl.dot(g, x, total, input_precision=PRECISION)
        left += BLOCK_TOKENS * tl.cast(rows, tl.int64)
        right += BLOCK_TOKENS * tl.cast(columns, tl.int64)
    places = main_grad + row[:, None] * tl.cast(columns, tl.int64) + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(places, tl.load(places, inside, other=0) + total, inside)


class Settings(NamedTuple):
    """Tile of the sum, tokens at a time, warps, stages of the pipeline of loads."""

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int


FEW = 128
"""Fewer tiles than this leave multiprocessors of an H100 (132) idle: smaller ones are taken."""


def _settings(element_size: int, is_amd: bool, rows: int, columns: int) -> Settings:
    """By the factors' dtype and the sum's shape; AMD's have 64 KiB of shared memory.

    Not by the number of tokens: it is a loop's length, and to cut it up would cost a second sum.
    """
    if element_size == 4:
        return Settings(64, 64, 32, 4, 2)
    stages = 2 if is_amd else 3
    if triton.cdiv(rows, 128) * triton.cdiv(columns, 128) < FEW:
        return Settings(64, 128, 64, 4, stages)
    return Settings(128, 128, 64, 8, stages)


@torch.library.custom_op("megapipe::add_weight_grad", mutates_args=("main_grad",))
def _launch(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> None:
    check_dtype("add_weight_grad", grad_out, inputs)
    if main_grad.dtype != torch.float32 or grad_out.dtype != inputs.dtype:
        found = ", ".join(
            str(x.dtype).removeprefix("torch.") for x in (main_grad, grad_out, inputs)
        )
        raise UnsupportedError(
            "add_weight_grad", f"takes a float32 sum and factors of one dtype, not {found}"
        )
    (tokens, rows), columns = grad_out.shape, inputs.shape[1]
    assert inputs.shape[0] == tokens
    assert main_grad.shape == (rows, columns)
    assert main_grad.is_contiguous()
    settings = _settings(inputs.element_size(), torch.version.hip is not None, rows, columns)
    tiles = triton.cdiv(rows, settings.rows) * triton.cdiv(columns, settings.columns)
    if tiles and tokens:
        _weight_grad[(tiles,)](
            main_grad,
            grad_out.contiguous(),
            inputs.contiguous(),
            tokens,
            rows,
            columns,
            PRECISION="ieee",  # of float32 factors: as exact as torch's
            GROUP=GROUP,
            BLOCK_ROWS=settings.rows,
            BLOCK_COLUMNS=settings.columns,
            BLOCK_TOKENS=settings.tokens,
            num_warps=settings.warps,
            num_stages=settings.stages,
            enable_fp_fusion=FP_FUSION,
        )


@_launch.register_fake
def _(main_grad: Tensor, grad_out: Tensor, inputs: Tensor) -> None:
    return None


def variants() -> Iterator[Variant]:
    """bfloat16 factors of many and of few tiles, and float32 factors."""
    for dtype, size, width in (("bf16", 2, 4096), ("bf16", 2, 1024), ("fp32", 4, 4096)):
        for targets, is_amd in ((("sm_80", "sm_90", "sm_100"), False), (("gfx942",), True)):
            settings = _settings(size, is_amd, width, width)
            yield Variant(
                _weight_grad,
                f"{dtype}, tiles of {settings.rows} by {settings.columns}",
                signature={"main_grad": "*fp32", "grad_out": f"*{dtype}", "inputs": f"*{dtype}"}
                | dict.fromkeys(("tokens", "rows", "columns"), "i32"),
                constants={
                    "PRECISION": "ieee",
                    "GROUP": GROUP,
                    "BLOCK_ROWS": settings.rows,
                    "BLOCK_COLUMNS": settings.columns,
                    "BLOCK_TOKENS": settings.tokens,
                },
                num_warps=settings.warps,
                num_stages=settings.stages,
                divisible=("tokens", "rows", "columns"),
                tensor_cores=size == 2,
                targets=targets,
            )
