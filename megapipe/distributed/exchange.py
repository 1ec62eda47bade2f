"""What ranks tell each other besides tensors, as JSON (never pickle)."""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_json(value: object, group: dist.ProcessGroup | None) -> list[Any]:
    """The JSON values of all ranks of `group` (None: the default group), in rank order."""
    padded, sizes = _pack(value, group)
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return _unpack(received, sizes)


def gather_json(value: object, group: dist.ProcessGroup | None) -> list[Any] | None:
    """As `all_gather_json`, but only the group's first rank receives; the others get None."""
    padded, sizes = _pack(value, group)
    is_first = dist.get_rank(group) == 0
    received = [torch.empty_like(padded) for _ in sizes] if is_first else None
    dist.gather(padded, received, group=group, group_dst=0)
    return _unpack(received, sizes) if received else None


def _pack(value: object, group: dist.ProcessGroup | None) -> tuple[Tensor, list[int]]:
    """This rank's bytes, padded to the longest, and the length of every rank's."""
    on_gpu = dist.get_backend(group) == dist.Backend.NCCL
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    data = bytearray(json.dumps(value, allow_nan=False).encode("ascii"))
    size = torch.tensor([len(data)], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(one) for one in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(data, dtype=torch.uint8)
    return padded, lengths


def _unpack(received: list[Tensor], sizes: list[int]) -> list[Any]:
    pairs = zip(received, sizes, strict=True)
    return [json.loads(part[:size].cpu().numpy().tobytes()) for part, size in pairs]
