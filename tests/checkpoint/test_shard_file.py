"""A file is laid out before anything is loaded, and is written with few tensors in memory."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megapipe.checkpoint import shard_file
from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.shard_file import plan_file, write_file
from megapipe.checkpoint.storage import BLOCK_BYTES
from tests.checkpoint.samples import same_bits, sample_tensors


def lazy(name: str, tensor: Tensor, load: Callable[[], Tensor]) -> Shard:
    return Shard(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor.to("meta"), load)


def test_a_file_of_lazy_tensors_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in sample_tensors(1).items() if tensor.numel()}
    loads: list[str] = []

    def loader(name: str) -> Callable[[], Tensor]:
        return lambda: (loads.append(name), tensors[name])[1]

    plan = plan_file("model.safetensors", [lazy(n, t, loader(n)) for n, t in tensors.items()])
    assert loads == []
    written: list[int] = []
    write_file(tmp_path, plan, written.append)
    assert sorted(loads) == sorted(tensors)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert plan.bytes == size
    assert sum(written) == size - len(plan.header)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("ahead", "most"), [(0, 1), (2 * BLOCK_BYTES, 2)])
def test_how_many_tensors_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int, most: int
) -> None:
    """One; and the next one where it is small enough to be loaded ahead."""
    monkeypatch.setattr(shard_file, "AHEAD_BYTES", ahead)
    loaded: list[weakref.ref[torch.UntypedStorage]] = []

    def load() -> Tensor:
        tensor = torch.zeros(BLOCK_BYTES + 1, dtype=torch.uint8)
        loaded.append(weakref.ref(tensor.untyped_storage()))
        assert sum(one() is not None for one in loaded) <= most
        return tensor

    tensor = torch.empty(BLOCK_BYTES + 1, dtype=torch.uint8, device="meta")
    gc.disable()  # what waits for it would be in memory
    try:
        write_file(tmp_path, plan_file("f", [lazy(str(i), tensor, load) for i in range(4)]))
    finally:
        gc.enable()
    assert len(loaded) == 4


def test_a_tensor_that_is_not_as_promised_is_a_fault(tmp_path: Path) -> None:
    plan = plan_file("f", [lazy("w", torch.zeros(2, 3), lambda: torch.zeros(3, 2))])
    with pytest.raises(AssertionError, match="w"):
        write_file(tmp_path, plan)
