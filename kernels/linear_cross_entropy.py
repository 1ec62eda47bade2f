"""Output projection and cross-entropy, a part of the tokens at a time.

    logits = h W^T,    loss = cross-entropy(logits),    dh = dlogits W,    dW = dlogits^T h

Logits of all tokens never exist: those of some rows are made in a buffer, turned into their
gradient in place, used for both products, and overwritten by the next. So both gradients are
computed in the forward pass (as in Liger's kernel, Hsu et al. 2024), with the three products that
the unfused way takes too; computing the logits again in the backward pass (Cut Cross-Entropy,
Wijmans et al. 2024) would take four. What is kept is one tensor like h.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megapipe.kernels.backend import Backend, choose
from megapipe.kernels.cross_entropy import (
    Combine,
    Vocabulary,
    checked_targets,
    combine_one,
    cross_entropy_gradient_,
    cross_entropy_stats_,
    token_losses,
)
from megapipe.kernels.weight_grad import add_weight_grad

PARTS, LEAST_ROWS = 16, 1024
"""Rows are cut into at most so many parts, of at least so many rows. Each part reads and writes the
gradient of W, 8 bytes a weight for 2 FLOPs a row: on an H100 (989 TFLOP/s, 3.35 TB/s) the product
takes as long as that from 1,181 rows on, on an H200 from 824."""

AddWeightGrad = Callable[[Tensor, Tensor], None]
"""(gradient of logits [N, V], h [N, H]): adds their product to the gradient of W."""


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    losses_N: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """h [N, H], W [V, H], targets [N] -> the sum of the losses, a scalar in float32 (float64).

    `losses_N`, where given, is filled with each target's loss, 0 for those ignored; it has no
    gradient. The gradient of W is summed in float32 (float64), [V, H], and rounded to W's dtype at
    the end. Raises RuntimeError for targets that are no class (on a GPU when it gets there), and
    UnsupportedError for float64 in Triton.
    """
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_NH,
        weight_VH,
        checked_targets(targets_N, weight_VH.shape[0], ignore_index),
        z_loss,
        losses_N,
        choose(backend, hidden_NH),
        torch.is_grad_enabled(),
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """All of the vocabulary in one part."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        z_loss: float,
        losses_N: Tensor | None,
        backend: Backend,
        differentiable: bool,
    ) -> Tensor:
        weight_grad = None
        if differentiable and ctx.needs_input_grad[1]:
            wide = torch.float64 if weight_VH.dtype == torch.float64 else torch.float32
            weight_grad = torch.zeros_like(
                weight_VH, dtype=wide, memory_format=torch.contiguous_format
            )

        def add(logits_grad: Tensor, hidden: Tensor) -> None:
            if weight_grad is not None:
                add_weight_grad(weight_grad, logits_grad, hidden, backend=backend)

        loss, hidden_grad = linear_cross_entropy_forward(
            hidden_NH,
            weight_VH,
            targets_N,
            vocabulary=Vocabulary(0, weight_VH.shape[0]),
            combine=combine_one,
            add_weight_grad=add if differentiable else None,
            z_loss=z_loss,
            losses_N=losses_N,
            backend=backend,
        )
        ctx.hidden_grad, ctx.weight_grad, ctx.dtype = hidden_grad, weight_grad, weight_VH.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight_grad = None
        if ctx.weight_grad is not None:
            weight_grad = (ctx.weight_grad * grad).to(ctx.dtype)
        return (ctx.hidden_grad * grad).to(ctx.hidden_grad), weight_grad, *[None] * 5


def linear_cross_entropy_forward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    vocabulary: Vocabulary,
    combine: Combine,
    add_weight_grad: AddWeightGrad | None,
    z_loss: float,
    backend: Backend,
    losses_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(sum of losses, gradient of h by this part of the vocabulary).

    Without `add_weight_grad` no gradient is computed and the second is None. Gradients are those of
    the sum itself: of a loss whose own gradient is 1. Negative targets are ignored. `combine` is
    called for each part of the rows, the same number of times wherever N is the same. `losses_N` is
    as in `linear_cross_entropy`.
    """
    loss = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
    hidden_grad = None if add_weight_grad is None else torch.empty_like(hidden_NH)
    one = torch.ones((), dtype=torch.float32, device=hidden_NH.device)
    parts = row_parts(hidden_NH.shape[0])
    # One buffer: a new one each time would be made before the last is given up, twice the memory.
    largest = max((part.stop - part.start for part in parts), default=0)
    buffer = hidden_NH.new_empty(largest, weight_VH.shape[0])
    for rows in parts:
        targets = targets_N[rows]
        logits = buffer[: rows.stop - rows.start]
        torch.mm(hidden_NH[rows], weight_VH.t(), out=logits)
        own = cross_entropy_stats_(logits, targets, **vocabulary._asdict(), backend=backend)
        found = combine(*own)
        each = token_losses(found, targets, z_loss)
        loss += each.sum()
        if losses_N is not None:
            losses_N[rows] = each
        if add_weight_grad is None or hidden_grad is None:
            continue
        cross_entropy_gradient_(
            logits,
            own[0],
            found,
            targets,
            **vocabulary._asdict(),
            grad=one,
            z_loss=z_loss,
            backend=backend,
        )
        torch.mm(logits, weight_VH, out=hidden_grad[rows])
        add_weight_grad(logits, hidden_NH[rows])
    wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    return loss.to(wide), hidden_grad


def row_parts(rows: int) -> list[slice]:
    """How the rows are cut."""
    size = max(LEAST_ROWS, -(-rows // PARTS))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
