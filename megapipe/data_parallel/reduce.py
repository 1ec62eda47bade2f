"""From partial gradients on each rank to the gradient of the global batch, and its norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megapipe.data_parallel.buffer import ParameterBuffer
from megapipe.mesh import Axis
from megapipe.tensor_parallel.collectives import all_reduce_, start_all_reduce

BUCKET_ELEMENTS = 32 * 1024 * 1024
"""Elements per all-reduce over the data axis (128 MiB in float32)."""


def reduce_gradients(buffers: Sequence[ParameterBuffer], data: Axis) -> None:
    """Complete the gradients after a step's last microbatch.

    Phase 1: sum pieces whose gradients are partial within the replica (norms under sequence
    parallelism, copies of key/value heads, tied embeddings), one collective for each set of ranks.
    Phase 2: sum each buffer over the data axis in buckets, all of them under way at once.
    """
    partial: dict[Axis, list[Tensor]] = {}
    named = [
        (piece.name, piece.sum_over, view)
        for buffer in buffers
        for piece, view in buffer.pieces(buffer.gradients)
        if piece.sum_over is not None
    ]
    for _, axis, view in sorted(named, key=lambda entry: entry[0]):
        assert axis is not None
        partial.setdefault(axis, []).append(view)
    for axis in sorted(partial, key=lambda axis: axis.name):
        _sum_together(partial[axis], axis)

    buckets = [b for buffer in buffers for b in buffer.gradients.split(BUCKET_ELEMENTS)]
    for pending in [start_all_reduce(bucket, data) for bucket in buckets]:
        pending.wait()


def _sum_together(views: Sequence[Tensor], axis: Axis) -> None:
    """All-reduce many small tensors as one; a single contiguous one in place."""
    if len(views) == 1 and views[0].is_contiguous():
        all_reduce_(views[0], axis)
        return
    flat = all_reduce_(torch.cat([view.flatten() for view in views]), axis)
    for view, part in zip(views, flat.split([view.numel() for view in views]), strict=True):
        view.copy_(part.view_as(view))


def local_squared_norm(buffers: Sequence[ParameterBuffer]) -> Tensor:
    """Sum of squares of the gradients that this rank counts, as a float64 scalar.

    Added up over a replica's ranks this is the squared global norm: each rectangle of a global
    tensor is counted on one rank, however many hold a copy of it; padding is zero.
    """
    views = [
        view
        for buffer in buffers
        for piece, view in buffer.pieces(buffer.gradients)
        if piece.counted and view.numel() > 0
    ]
    device = buffers[0].gradients.device
    if not views:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(views))
    return norms.double().square().sum()
