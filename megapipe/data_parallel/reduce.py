"""From partial gradients on each rank to the gradient of the global batch, and its norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megapipe.data_parallel.buffer import ParameterBuffer
from megapipe.distributed.mesh import Axis, Mesh
from megapipe.kernels import Backend, grad_norm
from megapipe.layout.parameters import ReductionGroup
from megapipe.tensor_parallel.collectives import all_reduce_, start_all_reduce

BUCKET_ELEMENTS = 32 * 1024 * 1024
"""Elements per all-reduce over the replicas (128 MiB in float32)."""


def reduce_gradients(buffers: Sequence[ParameterBuffer], mesh: Mesh) -> None:
    """Complete the gradients after a step's last microbatch.

    Phase 1: sum shards whose gradients are partial within the replica (norms under sequence
    parallelism, copies of key/value heads, tied embeddings), one collective for each set of ranks.
    Phase 2: sum each buffer over the replicas in buckets, all of them under way at once.
    """
    partial: dict[ReductionGroup, list[tuple[str, Tensor]]] = {}
    for buffer in buffers:
        for shard, view in buffer.shards(buffer.gradients):
            if shard.reduction_group is not None:
                partial.setdefault(shard.reduction_group, []).append((shard.name, view))
    for group in sorted(partial):  # as on every rank of each group, so that none waits for another
        named = sorted(partial[group], key=lambda entry: entry[0])
        _sum_together([view for _, view in named], mesh.reduction_axes[group])

    buckets = [b for buffer in buffers for b in buffer.gradients.split(BUCKET_ELEMENTS)]
    for pending in [start_all_reduce(bucket, mesh.batch) for bucket in buckets]:
        pending.wait()


def _sum_together(views: Sequence[Tensor], axis: Axis) -> None:
    """All-reduce many small tensors as one; a single contiguous one in place."""
    if len(views) == 1 and views[0].is_contiguous():
        all_reduce_(views[0], axis)
        return
    flat = all_reduce_(torch.cat([view.flatten() for view in views]), axis)
    for view, part in zip(views, flat.split([view.numel() for view in views]), strict=True):
        view.copy_(part.view_as(view))


def local_squared_norm(buffers: Sequence[ParameterBuffer], backend: Backend) -> Tensor:
    """Sum of squares of the gradients of the shards that this rank owns, as a float64 scalar.

    Added up over a replica's ranks this is the squared global norm: each rectangle of a global
    tensor has one owner, however many ranks hold a copy of it; padding is zero.
    """
    if backend == "triton":
        parts = [buffer.gradients[run] for buffer in buffers for run in buffer.owned_runs()]
        squares = [grad_norm(part, backend=backend)[0] for part in parts]
    else:
        views = [
            view
            for buffer in buffers
            for shard, view in buffer.shards(buffer.gradients)
            if shard.owner and view.numel() > 0
        ]
        norms = torch._foreach_norm(views) if views else ()
        squares = [torch.stack(norms).double().square().sum()] if norms else []
    if not squares:
        return torch.zeros((), dtype=torch.float64, device=buffers[0].gradients.device)
    return torch.stack(squares).sum()
