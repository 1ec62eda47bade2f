"""Cross-entropy over a vocabulary that is cut over tensor ranks; logits are never gathered.

    loss = sum over tokens of lse - x_target + z lse^2,    lse = log(sum_v exp(x_v))

Each rank finds its own maximum, sum of exponentials and target logit; three numbers per token cross
the ranks. The gradient is written over the logits.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapipe import kernels
from megapipe.distributed.mesh import Axis
from megapipe.kernels import Backend, Combined, Vocabulary, WeightGradBackend
from megapipe.tensor_parallel.collectives import (
    all_gather,
    all_reduce_,
    start_all_reduce,
    start_reduce_scatter,
)
from megapipe.tensor_parallel.parameter import ShardedParameter


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    vocabulary: Vocabulary,
    tensor: Axis,
    z_loss: float = 0.0,
    losses: Tensor | None = None,
    backend: Backend = "torch",
) -> Tensor:
    """Scalar sum of the losses of [...] targets, given this rank's [..., columns] of the logits.

    Columns beyond those of `vocabulary` are padding and count as minus infinity. Ignored targets
    (`IGNORED_TARGET`) give no loss and no gradient. Sums are float32 (float64 for float64 logits).
    The logits are overwritten, in forward already; only their producer may have saved them.
    `losses`, contiguous and in the shape of the targets, is filled with the loss of each where it
    is given: 0 for those ignored, z-loss included. It has no gradient.
    """
    return kernels.part_cross_entropy(
        logits.flatten(0, -2),
        targets.reshape(-1),
        vocabulary=vocabulary,
        combine=partial(_combine, tensor),
        z_loss=z_loss,
        losses_N=None if losses is None else losses.view(-1),
        backend=backend,
    )


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: ShardedParameter,
    targets: Tensor,
    *,
    tensor: Axis,
    sequence_parallel: bool,
    z_loss: float = 0.0,
    losses: Tensor | None = None,
    backend: Backend = "torch",
    weight_grad_backend: WeightGradBackend = "torch",
) -> Tensor:
    """The loss of `hidden` [S_local, B, H] times this rank's rows of `weight`, [V, H], without ever
    holding the logits of all tokens; `targets` are [S, B]. `losses` [S, B] is filled as by
    `vocab_parallel_cross_entropy`.

    Where autograd is on, both gradients are computed in the forward pass: that of the weight goes
    straight to its main gradient, unscaled. So the loss must be the end of the graph, its gradient
    1, as the pipeline executor has it; the backward pass checks that, and a schedule has nothing to
    defer here.
    """
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden,
        weight,
        targets.reshape(-1),
        tensor,
        sequence_parallel and tensor.size > 1,
        z_loss,
        None if losses is None else losses.view(-1),
        backend,
        weight_grad_backend,
        torch.is_grad_enabled(),
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: ShardedParameter,
        targets_N: Tensor,
        tensor: Axis,
        gathers: bool,
        z_loss: float,
        losses_N: Tensor | None,
        backend: Backend,
        weight_grad_backend: WeightGradBackend,
        differentiable: bool,
    ) -> Tensor:
        whole = all_gather(hidden, tensor) if gathers else hidden

        def add(logits_grad: Tensor, rows: Tensor) -> None:
            main_grad = weight.main_grad
            kernels.add_weight_grad(main_grad, logits_grad, rows, backend=weight_grad_backend)

        loss, ctx.hidden_grad = kernels.linear_cross_entropy_forward(
            whole.flatten(0, -2),
            weight,
            targets_N,
            vocabulary=own_vocabulary(weight),
            combine=partial(_combine, tensor),
            add_weight_grad=add if differentiable else None,
            z_loss=z_loss,
            losses_N=losses_N,
            backend=backend,
        )
        ctx.shape, ctx.tensor = whole.shape, tensor
        ctx.start = start_reduce_scatter if gathers else start_all_reduce
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        said = "the weight's gradient is that of a loss whose own gradient is 1"
        if grad.is_cuda:
            torch._assert_async(grad == 1, said)  # without a wait for the GPU
        else:
            assert grad == 1, said
        hidden_grad = ctx.start(ctx.hidden_grad.view(ctx.shape), ctx.tensor).wait()
        return (hidden_grad, *[None] * 9)


def own_vocabulary(weight: ShardedParameter) -> Vocabulary:
    """The classes that this rank's rows of an output weight stand for, without the padding."""
    (shard,) = weight.shards
    return Vocabulary(shard.start[0], shard.shape[0])


def _combine(tensor: Axis, max_N: Tensor, sum_N: Tensor, target_N: Tensor) -> Combined:
    """Over all ranks' parts of the vocabulary."""
    of_all_N = all_reduce_(max_N.clone(), tensor, dist.ReduceOp.MAX)
    scale_N = kernels.rescale(max_N, of_all_N)
    sum_N, target_N = all_reduce_(torch.stack([sum_N * scale_N, target_N]), tensor)
    return Combined(sum_N.log() + of_all_N, scale_N / sum_N, target_N)
