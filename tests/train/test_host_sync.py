"""A training step lets the host run ahead of the GPU: it reads once, at the end.

The wait for CUDA events, once a step before that read, is not seen here (docs/gpu.md).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megapipe import kernels
from megapipe.config import Config, load_config
from megapipe.data.distribute import ReplicaFeed
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.distributed.rank_group import Value
from megapipe.microbatch import MicroBatch
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.attention import RotaryTable
from megapipe.models.gpt.model import GPTStage
from megapipe.train.bubble import BubbleMeter
from megapipe.transfer import to_device
from tests.host_sync import DEVICE, HostSyncError, watch_host
from tests.layouts import engine_of, layout_of
from tests.ranks import run_ranks

CONFIGS = Path(__file__).parents[1] / "configs"
LAYOUTS = {
    "one process": (),
    "tp2": ("--parallel.tensor=2",),
    "tp2 sp": ("--parallel.tensor=2", "--parallel.sequence_parallel=true"),
    "pp2": ("--parallel.pipeline=2",),
    "pp2 zb-h1": ("--parallel.pipeline=2", "--parallel.schedule=zb-h1"),
    "dp2": ("--parallel.data=2",),
}
SWITCHES = {
    "plain": (),
    "documents": ("--data.mask_documents=true",),
    "dropout": ("--model.dropout=0.1", "--model.attention_dropout=0.1"),
    "recompute": ("--train.recompute=full",),
    "fused loss": ("--train.linear_cross_entropy=true", "--train.z_loss=1e-4"),
    "window, QK-norm": ("--model.sliding_window=4", "--model.qk_norm=true"),
}


def config(shape: str, *words: str) -> Config:
    small = ("--model.num_layers=2", "--train.global_batch_size=4", "--train.micro_batch_size=1")
    given = (
        "--parallel.data=1",
        "--train.precision=bf16",
        "--train.kernels=triton",
        *small,
        *words,
    )
    return load_config(CONFIGS / f"{shape}_shape.toml", given, FAMILIES)


def batches(given: Config) -> list[MicroBatch]:
    """Of one replica, on the device."""
    shape = (given.train.micro_batch_size, given.train.sequence_length)

    def make(dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    return [
        MicroBatch(
            tokens_BS=make(torch.int64),
            targets_BS=make(torch.int64),
            documents_BS=make(torch.int32) if given.data.mask_documents else None,
            samples_B=torch.zeros(shape[0], dtype=torch.int64, device=DEVICE),
            sources_BS=make(torch.int32),
        )
        for _ in range(layout_of(given).microbatches)
    ]


def mesh_of(given: Config, rank: int) -> Mesh:
    """One rank's. There are no other ranks: tensors have no values, and collectives do nothing."""
    axes = layout_of(given).axes
    if dist.is_initialized():
        dist.destroy_process_group()
    if axes.world_size > 1:
        words = {"store": FakeStore(), "rank": rank, "world_size": axes.world_size}
        dist.init_process_group("cpu:fake,meta:fake", **words)
    return build_mesh(axes, DEVICE)


def reads_of_steps(given: Config, rank: int, steps: int = 2) -> list[str]:
    """Where one rank of the layout reads from the device in these steps."""
    mesh = mesh_of(given, rank)
    engine, given_batches = engine_of(given, mesh), batches(given)
    engine.join(BubbleMeter(mesh, engine.program, engine.recorder))
    with watch_host(read_in="reduce") as reads:
        for _ in range(steps):
            engine.train_step(given_batches, 1e-3)
    return reads


def reads_of_all(given: Config) -> list[list[str]]:
    return [reads_of_steps(given, rank) for rank in range(layout_of(given).axes.world_size)]


def assert_reads_once_a_step(given: Config) -> None:
    for reads in run_ranks(reads_of_all, 1, given, timeout=300)[0]:
        assert len(reads) == 2
        assert len(set(reads)) == 1
        assert "megapipe/step_sums.py" in reads[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_waits_once_a_step_in_each_layout(layout: str) -> None:
    assert_reads_once_a_step(config("llama", *LAYOUTS[layout]))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_the_host_waits_once_a_step_with_each_switch(switch: str, kernels: str) -> None:
    for shape in ("llama", "gpt2"):
        if (shape, switch) != ("gpt2", "window, QK-norm"):
            assert_reads_once_a_step(config(shape, f"--train.kernels={kernels}", *SWITCHES[switch]))


def take_batches(given: Config, rank: int) -> int:
    """Have a rank take batches of text, the way a training step does; gives their number."""
    mesh = mesh_of(given, rank)
    feed = _Started(layout_of(given), mesh)
    with watch_host():
        taken = [feed.next() for _ in range(3)]
    feed.close()
    return sum(map(len, taken))


class _Started(ReplicaFeed):
    """Without what ranks tell each other at the start, where the host may wait."""

    def _on_readers(self, action: Callable[[], Value]) -> Value | None:
        return action() if self._mesh.model_parallel.is_first else None


@pytest.mark.parametrize("words", [(), ("--data.mask_documents=true",)], ids=["plain", "documents"])
def test_the_host_does_not_wait_for_a_batch(corpus: Path, words: tuple[str, ...]) -> None:
    """Neither on the rank that reads nor on those that it sends the tokens to."""
    layout = ("--parallel.pipeline=2", "--parallel.data=1", "--train.global_batch_size=4")
    given = load_config(corpus / "run.toml", [*layout, *words], FAMILIES)
    count = 3 * layout_of(given).microbatches
    for rank in range(2):
        assert run_ranks(take_batches, 1, given, rank, timeout=300) == [count]


# --- Each kind of wait, planted ------------------------------------------------------------------

HERE = torch.arange(6.0)
"""In the host's memory."""
KINDS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0]),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "a branch": lambda x: 1 if x.sum() > 0 else 0,
    "a range": lambda x: list(range(x[0].long())),  # type: ignore[call-overload]
    "numpy": lambda x: x.numpy(),
    "print": lambda x: print(x),
    "f-string": lambda x: f"{x}",
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "to the host, not waiting": lambda x: x.to("cpu", non_blocking=True),
    "copied to the host": lambda x: HERE.clone().copy_(x),
    "to the device": lambda x: HERE.to(x.device),
    "to the device, with a dtype": lambda x: HERE.to(x.device, torch.bfloat16),
    "to the device, from ordinary memory": lambda x: HERE.to(x.device, non_blocking=True),
    "to the device, pinned and waiting": lambda x: HERE.pin_memory().to(x.device),
    "copied to the device": lambda x: x.copy_(HERE),
    "assigned": lambda x: x.__setitem__(slice(0, 6), HERE),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.__setitem__(x > 0, HERE[0]),
    "list index": lambda x: x[[0, 2]],
    "list among indices": lambda x: x.view(2, 3)[:, [0, 2]],
    "assigned at a list": lambda x: x.__setitem__([0, 2], 1.0),
    "index of the host": lambda x: x[HERE.long()],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "bincount": lambda x: torch.bincount(x.long()),
    "mixed": lambda x: torch.where(x > 0, x, HERE),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "pinned": lambda x: to_device(HERE, x.device),
    "a fill": lambda x: torch.full((3,), 2.0, device=x.device),
    "a number": lambda x: x.__setitem__(0, 2.0),
    "a slice": lambda x: x.__setitem__(slice(2), x[:2]),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "an index of the device": lambda x: x[x.long()],
    "a number of the host": lambda x: x * HERE[2],
    "values of the host": lambda x: HERE[HERE > 2].tolist(),
    "a shape": lambda x: f"{x.shape} {len(x)} {x.dtype}",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_wait_is_found(kind: str) -> None:
    x = torch.empty(6, device=DEVICE)
    with pytest.raises(HostSyncError, match=r"test_host_sync\.py"), watch_host():
        KINDS[kind](x)


@pytest.mark.parametrize("kind", FREE)
def test_what_does_not_wait_is_allowed(kind: str) -> None:
    x = torch.empty(6, device=DEVICE)
    with watch_host() as reads:
        FREE[kind](x)
    assert reads == []


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        grads[0].sum().item()
        return grads[0] * 2


def test_a_wait_in_a_backward_pass_is_found() -> None:
    x = torch.empty(6, device=DEVICE, requires_grad=True)
    with watch_host():
        loss = _ReadsInBackward.apply(x).sum()
        with pytest.raises(HostSyncError, match=r"test_host_sync\.py:\d+ in backward"):
            loss.backward()


def test_a_second_read_in_a_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = GPTStage.hidden

    def reading(self: GPTStage, *args: object) -> Tensor:
        x = hidden(self, *args)  # type: ignore[arg-type]
        assert float(x.sum()) < 1e9
        return x

    monkeypatch.setattr(GPTStage, "hidden", reading)
    with pytest.raises(HostSyncError, match=r"__float__ of a tensor .* in reading"):
        reads_of_steps(config("llama"), rank=0)


def test_angles_computed_on_the_host_in_each_forward_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frequencies = kernels.rope_frequencies(8, 1e4, None)

    def rows(self: RotaryTable, first: int, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(first, first + length, device=DEVICE).double()
        angles = positions[:, None] * frequencies.to(DEVICE)
        return angles.cos().float(), angles.sin().float()

    monkeypatch.setattr(RotaryTable, "rows", rows)
    with pytest.raises(HostSyncError, match=r"a copy between host and device at .* in rows"):
        reads_of_steps(config("llama"), rank=0)
