"""Cross-entropy over a vocabulary that may be cut into parts, and its gradient over the logits.

    loss = lse - x_target + z lse^2,    lse = log(sum_v exp(x_v)) = m + log(sum_v exp(x_v - m))
    dx_v = dloss (p_v (1 + 2 z lse) - [v = target]),    p_v = exp(x_v - m) share

The first half finds a part's maximum m, its sum of exp(x - m) and its target logits in one pass
over the logits; the caller combines those of all parts (`Combined`; `share` is the probability of
a class whose logit is m, for exp(x - lse) would lose digits where p is near 1). The second half
writes the gradient over the logits, so no copy of [N, V] is ever made. z pulls lse towards 0 (the
z-loss of PaLM, Chowdhery et al. 2022). Sums are float32 (float64 for float64 logits) whatever the
logits are: a probability near 1 in bfloat16 has no digits left for p - 1.

Bytes: logits read, then read and written, 3 times their size in all.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapipe.kernels.backend import FP_FUSION, Backend, UnsupportedError, check_dtype, choose
from megapipe.kernels.compilation import Variant

CHUNK_BYTES = 16 * 2**20
"""Of torch's: logits in less than float32 are widened in pieces of at most this size."""
BLOCK, WARPS = 4096, 8
"""Of Triton's: columns at a time."""


def cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    overwrite: bool = False,
    losses_N: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """[N, V], targets [N] -> the sum of the losses, a scalar in float32 (float64).

    `losses_N`, where given, is filled with each target's loss, 0 for those ignored; it has no
    gradient. With `overwrite` the gradient of the sum takes the place of the logits, which are
    spoilt from the forward pass on and may have been saved by nobody but their producer; else they
    are copied first.
    Raises RuntimeError for targets that are no class (on a GPU when it gets there), and in Triton
    UnsupportedError for float64, and with `overwrite` for rows that are not dense.
    """
    return part_cross_entropy(
        logits_NV if overwrite else logits_NV.clone(memory_format=torch.contiguous_format),
        checked_targets(targets_N, logits_NV.shape[1], ignore_index),
        vocabulary=Vocabulary(0, logits_NV.shape[1]),
        combine=combine_one,
        z_loss=z_loss,
        losses_N=losses_N,
        backend=choose(backend, logits_NV),
    )


def checked_targets(targets_N: Tensor, classes: int, ignore_index: int) -> Tensor:
    """-1 for those ignored. The check does not wait for a GPU: it is an assertion there."""
    ignored = targets_N == ignore_index
    exist = (targets_N >= 0) & (targets_N < classes)
    problem = f"a target is neither ignored nor in 0 to {classes - 1}"
    torch._assert_async((exist | ignored).all(), problem)
    return torch.where(ignored, -1, targets_N)


class Vocabulary(NamedTuple):
    """A part's classes: from `first` on, `valid` of them; what is beyond is padding."""

    first: int
    valid: int


class Combined(NamedTuple):
    """What all parts of the vocabulary say together, [N] each."""

    lse_N: Tensor
    share_N: Tensor  # exp(m - lse), with the maximum m of the part that is asking
    target_N: Tensor


Combine = Callable[[Tensor, Tensor, Tensor], Combined]
"""(maximum, sum of exp(x - maximum), target logit) of one part of the vocabulary, [N] each -> what
all parts say."""


def part_cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    vocabulary: Vocabulary,
    combine: Combine,
    z_loss: float,
    backend: Backend,
    losses_N: Tensor | None = None,
) -> Tensor:
    """The sum of the losses, given one part's logits, which are overwritten as by `cross_entropy`;
    negative targets are ignored. `combine` is called once, in the forward pass. `losses_N` is as in
    `cross_entropy`: each loss is that of all parts together."""
    loss: Tensor = _CrossEntropy.apply(
        logits_NV, targets_N, vocabulary, combine, z_loss, losses_N, backend
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        vocabulary: Vocabulary,
        combine: Combine,
        z_loss: float,
        losses_N: Tensor | None,
        backend: Backend,
    ) -> Tensor:
        own = cross_entropy_stats_(logits_NV, targets_N, **vocabulary._asdict(), backend=backend)
        found = combine(*own)
        ctx.save_for_backward(logits_NV, own[0], *found, targets_N)
        ctx.vocabulary, ctx.z_loss, ctx.backend = vocabulary, z_loss, backend
        each_N = token_losses(found, targets_N, z_loss)
        if losses_N is not None:
            losses_N.copy_(each_N)
        return each_N.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, max_N, *found, targets_N = ctx.saved_tensors
        cross_entropy_gradient_(
            logits_NV,
            max_N,
            Combined(*found),
            targets_N,
            **ctx.vocabulary._asdict(),
            grad=grads[0],
            z_loss=ctx.z_loss,
            backend=ctx.backend,
        )
        return logits_NV, *[None] * 6


def cross_entropy_stats_(
    logits_NV: Tensor, targets_N: Tensor, *, first: int, valid: int, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum m, sum of exp(x - m), logit of the target), [N] each, of one part of the vocabulary.

    Column c stands for class `first` + c; columns from `valid` on are padding. Where the target
    lies in another part (or is negative) its logit is 0; a part without columns has m = -inf and
    sum 0. The logits then belong to `cross_entropy_gradient_`: torch leaves exp(x - m) in them.
    """
    if backend == "triton":
        check_dtype("cross_entropy", logits_NV)
        if not _rows_are_dense(logits_NV):
            raise UnsupportedError("cross_entropy", "a row's logits do not lie side by side")
        max_N, sum_N, target_N = torch.ops.megapipe.cross_entropy_stats(
            logits_NV, targets_N, first, valid
        )
        return max_N, sum_N, target_N
    wide = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    rows = logits_NV.shape[0]
    if valid == 0:
        nothing = torch.zeros(rows, dtype=wide, device=logits_NV.device)
        return torch.full_like(nothing, -torch.inf), nothing, nothing.clone()
    own, index = _own_targets(targets_N, first, valid)
    max_N = logits_NV[:, :valid].amax(dim=1).to(wide)
    target_N = torch.where(own, logits_NV.gather(1, index).squeeze(1).to(wide), 0)
    shift_N = torch.where(max_N == -torch.inf, 0, max_N)
    sum_N = torch.empty_like(max_N)
    for part in _chunks(logits_NV):
        # `to` gives the logits themselves where they are wide already.
        exponentials = logits_NV[part, :valid].to(wide).sub_(shift_N[part, None]).exp_()
        sum_N[part] = exponentials.sum(dim=1)
    return max_N, sum_N, target_N


def combine_one(max_N: Tensor, sum_N: Tensor, target_N: Tensor) -> Combined:
    """Of a vocabulary in one part."""
    return Combined(max_N + sum_N.log(), sum_N.reciprocal(), target_N)


def rescale(max_N: Tensor, of_all_N: Tensor) -> Tensor:
    """What a part's sum of exp(x - m) is multiplied by to be one of exp(x - m of all parts)."""
    return torch.where(max_N == -torch.inf, 0, (max_N - of_all_N).exp())


def token_losses(found: Combined, targets_N: Tensor, z_loss: float) -> Tensor:
    """[N] losses, 0 for negative targets."""
    losses_N = found.lse_N - found.target_N
    if z_loss:
        losses_N = losses_N + z_loss * found.lse_N.square()
    return torch.where(targets_N >= 0, losses_N, 0)


def cross_entropy_gradient_(
    logits_NV: Tensor,
    max_N: Tensor,
    found: Combined,
    targets_N: Tensor,
    *,
    first: int,
    valid: int,
    grad: Tensor,
    z_loss: float,
    backend: Backend,
) -> None:
    """Write the gradient over what `cross_entropy_stats_` left; 0 for negative targets and padding.

    `grad` is the scalar gradient of the sum of losses, `max_N` the part's own maximum.
    """
    lse_N, share_N, _ = found
    if backend == "triton":
        torch.ops.megapipe.cross_entropy_gradient_(
            logits_NV, max_N, share_N, lse_N, targets_N, grad, first, valid, z_loss
        )
        return
    wide = lse_N.dtype
    own, index = _own_targets(targets_N, first, valid)
    slope_N = share_N * grad.to(wide)
    if z_loss:
        slope_N = slope_N * (1 + 2 * z_loss * lse_N)
    slope_N1 = torch.where(targets_N >= 0, slope_N, 0).unsqueeze(1)
    at_target_N1 = torch.where(own, -grad, 0).to(wide).unsqueeze(1)
    logits_NV[:, valid:] = 0
    if valid == 0:
        return
    shift_N1 = torch.where(max_N == -torch.inf, 0, max_N).unsqueeze(1)
    for rows in _chunks(logits_NV):
        part = logits_NV[rows]
        if part.dtype == wide:
            part.mul_(slope_N1[rows]).scatter_add_(1, index[rows], at_target_N1[rows])
        else:
            shifted = part.to(wide).sub_(shift_N1[rows]).exp_().mul_(slope_N1[rows])
            part.copy_(shifted.scatter_add_(1, index[rows], at_target_N1[rows]))
            part[:, valid:] = 0


def _own_targets(targets_N: Tensor, first: int, valid: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in this part, and each one's column [N, 1] (0 where it does not)."""
    own = (targets_N >= first) & (targets_N < first + valid)
    return own, torch.where(own, targets_N - first, 0).unsqueeze(1)


def _chunks(logits_NV: Tensor) -> list[slice]:
    """Rows at a time: all, or as many as CHUNK_BYTES hold in float32."""
    rows, columns = logits_NV.shape
    size = max(1, CHUNK_BYTES // (4 * columns)) if logits_NV.element_size() < 4 else max(1, rows)
    return [slice(start, start + size) for start in range(0, rows, size)]


@triton.jit
def _cross_entropy_stats(  # type: ignore[no-untyped-def]
    logits, targets, maxima, sums, at_targets, stride, first, valid, BLOCK: tl.constexpr
):
    """One row: a running maximum, and the sum so far rescaled whenever it grows."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    largest = -float("inf")
    total = 0.0
    for start in range(0, valid, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, columns < valid, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 0)
        largest = larger
    column = tl.load(targets + row) - first
    own = (column >= 0) & (column < valid)
    tl.store(maxima + row, largest)
    tl.store(sums + row, total)
    tl.store(at_targets + row, tl.load(logits + column, own, other=0).to(tl.float32))


@triton.jit
def _cross_entropy_gradient(  # type: ignore[no-untyped-def]
    logits,
    maxima,
    shares,
    lse,
    targets,
    grad,
    stride,
    width,
    first,
    valid,
    z_loss,
    BLOCK: tl.constexpr,
):
    """One block of a row's columns; `width` counts the padding too."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + row * stride + columns
    x = tl.load(places, columns < valid, other=-float("inf")).to(tl.float32)
    target = tl.load(targets + row)
    slope = tl.where(target < 0, 0.0, tl.load(grad).to(tl.float32))
    largest = tl.load(maxima + row)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    share = tl.load(shares + row) * (1 + 2 * z_loss * tl.load(lse + row))
    dx = tl.exp(x - shift) * share
    dx -= tl.where(columns == target - first, 1.0, 0.0)
    dx = tl.where((target >= 0) & (columns < valid), dx * slope, 0.0)
    tl.store(places, dx.to(logits.dtype.element_ty), columns < width)


@torch.library.custom_op("megapipe::cross_entropy_stats", mutates_args=())
def _stats(
    logits_NV: Tensor, targets_N: Tensor, first: int, valid: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits_NV.shape[0]
    assert _rows_are_dense(logits_NV)
    max_N, sum_N, target_N = (logits_NV.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows:
        _cross_entropy_stats[(rows,)](
            logits_NV,
            targets_N.contiguous(),
            max_N,
            sum_N,
            target_N,
            logits_NV.stride(0),
            first,
            valid,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return max_N, sum_N, target_N


@torch.library.custom_op("megapipe::cross_entropy_gradient_", mutates_args=("logits_NV",))
def _gradient(
    logits_NV: Tensor,
    max_N: Tensor,
    share_N: Tensor,
    lse_N: Tensor,
    targets_N: Tensor,
    grad: Tensor,
    first: int,
    valid: int,
    z_loss: float,
) -> None:
    rows, width = logits_NV.shape
    assert _rows_are_dense(logits_NV)
    if rows and width:
        _cross_entropy_gradient[(rows, triton.cdiv(width, BLOCK))](
            logits_NV,
            max_N,
            share_N,
            lse_N,
            targets_N.contiguous(),
            grad,
            logits_NV.stride(0),
            width,
            first,
            valid,
            z_loss,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=FP_FUSION,
        )


def _rows_are_dense(x: Tensor) -> bool:
    return x.numel() == 0 or x.shape[1] == 1 or x.stride(1) == 1


@_stats.register_fake
def _(
    logits_NV: Tensor, targets_N: Tensor, first: int, valid: int
) -> tuple[Tensor, Tensor, Tensor]:
    made = [logits_NV.new_empty(logits_NV.shape[0], dtype=torch.float32) for _ in range(3)]
    return made[0], made[1], made[2]


@_gradient.register_fake
def _(*args: object) -> None:
    return None


def variants() -> Iterator[Variant]:
    """Both halves for bfloat16 and float32 logits."""
    common = {"targets": "*i64", "stride": "i32", "first": "i32", "valid": "i32"}
    for dtype in ("bf16", "fp32"):
        yield Variant(
            _cross_entropy_stats,
            f"{dtype} logits",
            signature={"logits": f"*{dtype}"}
            | common
            | dict.fromkeys(("maxima", "sums", "at_targets"), "*fp32"),
            constants={"BLOCK": BLOCK},
            num_warps=WARPS,
            divisible=("stride", "first", "valid"),
        )
        yield Variant(
            _cross_entropy_gradient,
            f"{dtype} logits",
            signature={"logits": f"*{dtype}"}
            | dict.fromkeys(("maxima", "shares", "lse", "grad"), "*fp32")
            | {"width": "i32", "z_loss": "fp32"}
            | common,
            constants={"BLOCK": BLOCK},
            num_warps=WARPS,
            divisible=("stride", "width", "first", "valid"),
        )
