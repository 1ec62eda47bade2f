"""Collectives over one axis. The layers call them from their own forward and backward.

They are the process group's, or those of `Axis.shared` where its ranks share memory.

Sequence-parallel tensors are cut along dim 0, the sequence, so that shards concatenate without a
copy. Over an axis of size one each function returns its input.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megapipe.distributed.mesh import Axis
from megapipe.distributed.shared_memory.collectives import UnderWay

# torch 2.13 renamed these; the old names still work there but warn, and 2.11 knows only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Pending:
    """A collective under way: `wait()` returns its result."""

    result: Tensor
    work: dist.Work | UnderWay | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.result


def start_all_reduce(
    x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Pending:
    """Reduce `x` over the axis, in place where it is contiguous, without waiting."""
    if axis.group is None:
        return Pending(x, None)
    x = x.contiguous()
    if axis.shared is not None:
        return Pending(x, axis.shared.all_reduce(x, op))
    return Pending(x, dist.all_reduce(x, op, axis.group, async_op=True))


def start_all_gather(x: Tensor, axis: Axis) -> Pending:
    """[n, ...] on each rank -> [axis.size * n, ...] on all, in axis order, without waiting."""
    if axis.group is None:
        return Pending(x, None)
    out = x.new_empty(x.shape[0] * axis.size, *x.shape[1:])
    x = x.contiguous()
    if axis.shared is not None:
        return Pending(out, axis.shared.all_gather(out, x))
    return Pending(out, _all_gather(out, x, group=axis.group, async_op=True))


def start_reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """[axis.size * n, ...] on each rank -> this rank's [n, ...] of the sum, without waiting."""
    if axis.group is None:
        return Pending(x, None)
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    x = x.contiguous()
    if axis.shared is not None:
        return Pending(out, axis.shared.reduce_scatter(out, x))
    return Pending(out, _reduce_scatter(out, x, group=axis.group, async_op=True))


def all_reduce_(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a contiguous `x` over the axis in place and return it."""
    assert x.is_contiguous()
    return start_all_reduce(x, axis, op).wait()


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    return start_all_gather(x, axis).wait()


def own_sequence_slice(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of dim 0 of a tensor that all ranks hold whole."""
    return x.chunk(axis.size)[axis.rank] if axis.size > 1 else x


def sum_partial(x: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
    """Partial [S, ...] -> their sum: [S, ...] (in place), or this rank's [S / size, ...] of it."""
    start = start_reduce_scatter if sequence_parallel else start_all_reduce
    return start(x, axis).wait()
