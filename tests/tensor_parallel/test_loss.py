"""Output projection and loss together, cut over tensor ranks: what the unfused way computes,
without its logits; and the loss of each target either way."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megapipe.distributed.mesh import Axis
from megapipe.layout.parameters import shard_of
from megapipe.tensor_parallel.collectives import own_sequence_slice
from megapipe.tensor_parallel.linear import column_parallel_linear
from megapipe.tensor_parallel.loss import (
    own_vocabulary,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from megapipe.tensor_parallel.parameter import ShardedParameter
from megapipe.tensor_parallel.weight_grad import WeightGradStore
from tests.ranks import run_ranks
from tests.tensor_parallel.samples import FLOAT64, parameters_of, tensor_axis, vocabulary

S, B, H = 32, 2, 12
Z_LOSS = 1e-2


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def test_the_classes_are_those_of_the_shard() -> None:
    """Of 70 on two ranks the first has 64; the second has 6, and 58 rows of padding."""
    spec = vocabulary("output.weight", 70, H)
    for rank, expected in enumerate([(0, 64), (64, 6)]):
        shard = shard_of(spec, tensor_rank=rank, tensor_size=2, sequence_parallel=False)
        weight = ShardedParameter((shard,), dtype=FLOAT64, device="cpu")
        assert own_vocabulary(weight) == expected


def weight_of(tensor: Axis, vocab_size: int) -> ShardedParameter:
    table = [vocabulary("output.weight", vocab_size, H)]
    weight = parameters_of(table, tensor).get("output.weight")
    (shard,) = weight.shards
    whole = whole_weight(shard.global_shape)
    start = shard.start[0]
    shard.view(weight.data).copy_(whole[start : start + shard.shape[0]])
    weight.attach_main_grad(torch.zeros_like(weight))
    return weight


def whole_weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator(1), dtype=FLOAT64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def both_ways(size: int, vocab_size: int, sequence_parallel: bool) -> None:
    """Called on each rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["megapipe.kernels.linear_cross_entropy"], "LEAST_ROWS", 4)
        compare(size, vocab_size, sequence_parallel)


def compare(size: int, vocab_size: int, sequence_parallel: bool) -> None:
    tensor = tensor_axis(size)
    whole = torch.randn(S, B, H, generator=generator(2), dtype=FLOAT64)
    hidden = own_sequence_slice(whole, tensor) if sequence_parallel else whole
    targets = torch.randint(vocab_size, (S, B), generator=generator(3))
    targets[3:9, 1] = -100
    logits = (whole @ whole_weight((vocab_size, H)).t()).movedim(-1, 1)  # [S, V, B]
    each = F.cross_entropy(logits, targets, reduction="none")
    each += torch.where(targets >= 0, Z_LOSS * logits.logsumexp(1).square(), 0)
    found, sizes = [], []
    for fused in (False, True):
        weight, leaf = weight_of(tensor, vocab_size), hidden.clone().requires_grad_()
        losses = torch.full((S, B), torch.nan, dtype=FLOAT64)
        common = {"tensor": tensor, "z_loss": Z_LOSS, "losses": losses}
        with LargestTensor() as largest:
            if fused:
                loss = vocab_parallel_linear_cross_entropy(
                    leaf, weight, targets, sequence_parallel=sequence_parallel, **common
                )
            else:
                logits = column_parallel_linear(
                    leaf,
                    weight,
                    None,
                    tensor=tensor,
                    sequence_parallel=sequence_parallel,
                    store=WeightGradStore(),
                )
                loss = vocab_parallel_cross_entropy(
                    logits, targets, vocabulary=own_vocabulary(weight), **common
                )
            loss.backward()
        assert leaf.grad is not None
        torch.testing.assert_close(losses, each, rtol=1e-9, atol=1e-9)
        assert not losses[targets < 0].any()
        found.append((loss.detach(), leaf.grad, weight.main_grad))
        sizes.append(largest.elements)
    for own, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
    logits_size = S * B * weight_of(tensor, vocab_size).shape[0]
    assert sizes[0] >= logits_size, "the probe sees the unfused way's logits"
    assert sizes[1] <= max(logits_size // 8, S * B * H, weight_of(tensor, vocab_size).numel())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("vocab_size", [256, 131])
def test_equals_the_unfused_loss(size: int, sequence_parallel: bool, vocab_size: int) -> None:
    run_ranks(both_ways, size, size, vocab_size, sequence_parallel)


def test_without_gradients_only_the_loss() -> None:
    tensor = Axis("tensor")
    weight = weight_of(tensor, 100)
    hidden = torch.randn(S, B, H, generator=generator(2), dtype=FLOAT64)
    targets = torch.randint(100, (S, B), generator=generator(3))
    with torch.no_grad():
        loss = vocab_parallel_linear_cross_entropy(
            hidden, weight, targets, tensor=tensor, sequence_parallel=False
        )
    assert loss > 0
    assert not weight.main_grad.any()


def test_a_loss_that_is_not_the_end_is_refused() -> None:
    weight = weight_of(Axis("tensor"), 100)
    hidden = nn.Parameter(torch.randn(S, B, H, generator=generator(2), dtype=FLOAT64))
    targets = torch.randint(100, (S, B), generator=generator(3))
    loss = vocab_parallel_linear_cross_entropy(
        hidden, weight, targets, tensor=Axis("tensor"), sequence_parallel=False
    )
    with pytest.raises(AssertionError, match="a loss whose own gradient is 1"):
        (2 * loss).backward()
