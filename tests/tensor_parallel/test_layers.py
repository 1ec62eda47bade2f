"""Layers cut over ranks compute what the whole layer computes: outputs, input and weight gradients.

Each rank holds its shards of global weights that are a function of their names, and every shard's
gradient is compared with that rectangle of the whole gradient.
"""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapipe.distributed.mesh import Axis
from megapipe.layout.parameters import (
    Init,
    ParameterShard,
    ParameterSpec,
    Split,
    padded_rows,
    shard_of,
)
from megapipe.parameter_role import Role
from megapipe.tensor_parallel.collectives import all_reduce_, own_sequence_slice
from megapipe.tensor_parallel.embedding import VocabParallelEmbedding
from megapipe.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megapipe.tensor_parallel.loss import own_vocabulary, vocab_parallel_cross_entropy
from megapipe.tensor_parallel.parameter import ShardedParameter, sharded_parameters
from megapipe.tensor_parallel.weight_grad import WeightGradStore
from tests.ranks import run_ranks
from tests.tensor_parallel.samples import (
    FLOAT64,
    MULTIPLE,
    matrix,
    parameters_of,
    tensor_axis,
    vocabulary,
)

S, B, H, OUT = 8, 2, 12, 16


def values(name: str, shape: Sequence[int]) -> Tensor:
    """A global tensor that every rank knows."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(*shape, dtype=FLOAT64, generator=generator)


def prepare(module: nn.Module) -> None:
    """Global values into every shard, and a gradient buffer behind every parameter."""
    for parameter in sharded_parameters(module):
        parameter.attach_main_grad(torch.zeros_like(parameter))
        for shard in parameter.shards:
            whole = values(shard.name, shard.global_shape)
            shard.view(parameter.data).copy_(whole[cut(shard)])


def cut(shard: ParameterShard) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(shard.start, shard.shape, strict=True))


def check_gradients(module: nn.Module, tensor: Axis, expected: dict[str, Tensor]) -> None:
    """Of all shards; those whose gradients are partial are summed over the whole axis."""
    checked = []
    for parameter in sharded_parameters(module):
        assert parameter.grad is None
        for shard in parameter.shards:
            found = shard.view(parameter.main_grad)
            if shard.reduction_group is not None:
                assert shard.reduction_group == (("tensor", tuple(range(tensor.size))),)
                found = all_reduce_(found.contiguous(), tensor)
            torch.testing.assert_close(found, expected[shard.name][cut(shard)])
            checked.append(shard.name)
    assert sorted(checked) == sorted(expected)


def leaf(name: str, shape: Sequence[int]) -> Tensor:
    return values(name, shape).requires_grad_()


def bias(name: str, length: int, split: Split | None) -> ParameterSpec:
    """Where it is whole, ranks under sequence parallelism have parts of its gradient."""
    partial = "sequence" if split is None else "never"
    return ParameterSpec(name, (length,), (0,), Init("zeros"), Role.BIAS, split, partial)


TABLE = (
    matrix("a.weight", OUT, H),
    matrix("b.weight", OUT, H),
    bias("a.bias", OUT, Split(0)),
    bias("b.bias", OUT, Split(0)),
    matrix("row.weight", H, OUT, dim=1),
    bias("row.bias", H, None),
)


def _linear_pair(size: int, sequence_parallel: bool, deferred: bool) -> None:
    """column(x) -> relu -> row: as in a feed-forward block, two weights stacked in the first."""
    tensor, store = tensor_axis(size), WeightGradStore()
    own_parameters = parameters_of(TABLE, tensor, sequence_parallel=sequence_parallel)
    column = ColumnParallelLinear(
        own_parameters.get("a.weight", "b.weight"),
        own_parameters.get("a.bias", "b.bias"),
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        store=store,
    )
    row = RowParallelLinear(
        own_parameters.get("row.weight"),
        own_parameters.get("row.bias"),
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        store=store,
    )
    module = nn.ModuleList([column, row])
    prepare(module)

    # The whole computation.
    weights = {spec.name: leaf(spec.name, spec.shape) for spec in TABLE}
    x = leaf("x", (S, B, H))
    a = F.linear(x, weights["a.weight"], weights["a.bias"])
    b = F.linear(x, weights["b.weight"], weights["b.bias"])
    y = F.linear(a.relu() * b, weights["row.weight"], weights["row.bias"])
    grad = values("grad", y.shape)
    grad_x, *grads = torch.autograd.grad(y, [x, *weights.values()], grad)

    # The rank's part of it.
    own = (lambda t: own_sequence_slice(t, tensor)) if sequence_parallel else (lambda t: t)
    own_x = own(x.detach()).clone().requires_grad_()
    own_a, own_b = column(own_x).chunk(2, dim=-1)
    own_y = row(own_a.relu() * own_b)
    torch.testing.assert_close(own_y, own(y.detach()))
    if deferred:
        with store.defer() as closures:
            own_y.backward(own(grad))
        assert len(closures) == 2
        assert not column.weight.main_grad.any(), "weight gradients wait"
        for closure in closures:
            closure()
    else:
        own_y.backward(own(grad))
    assert own_x.grad is not None
    torch.testing.assert_close(own_x.grad, own(grad_x))
    check_gradients(module, tensor, dict(zip(weights, grads, strict=True)))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_column_and_row_parallel_linear(size: int, sequence_parallel: bool, deferred: bool) -> None:
    run_ranks(_linear_pair, size, size, sequence_parallel, deferred)


def _embedding(size: int, sequence_parallel: bool, vocab_size: int) -> None:
    tensor = tensor_axis(size)
    weight = parameters_of([vocabulary("embedding", vocab_size, H)], tensor).get("embedding")
    layer = VocabParallelEmbedding(weight, tensor=tensor, sequence_parallel=sequence_parallel)
    prepare(layer)
    tokens = torch.arange(B * S).view(B, S) * 7 % vocab_size
    tokens[0, :3] = vocab_size - 1  # the last row, and one that is read more than once
    whole = leaf("embedding", (vocab_size, H))
    x = F.embedding(tokens.t(), whole)
    grad = values("grad", x.shape)
    (expected,) = torch.autograd.grad(x, whole, grad)

    own = (lambda t: own_sequence_slice(t, tensor)) if sequence_parallel else (lambda t: t)
    own_x = layer(tokens)
    torch.testing.assert_close(own_x, own(x.detach()))
    own_x.backward(own(grad))
    check_gradients(layer, tensor, {"embedding": expected})
    (shard,) = weight.shards
    assert weight.shape[0] == shard.shape[0] + shard.padding
    assert not weight.main_grad[shard.shape[0] :].any(), "padding has no gradient"


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("vocab_size", [256, 131, 5])
def test_vocab_parallel_embedding(size: int, sequence_parallel: bool, vocab_size: int) -> None:
    run_ranks(_embedding, size, size, sequence_parallel, vocab_size)


def test_an_embedding_looks_up_the_rows_of_its_shard() -> None:
    """Whatever the rank's number is: here the second half of a vocabulary, on one process."""
    spec = vocabulary("embedding", 2 * MULTIPLE, H)
    shard = shard_of(spec, tensor_rank=1, tensor_size=2, sequence_parallel=False)
    weight = ShardedParameter((shard,), dtype=FLOAT64, device="cpu")
    layer = VocabParallelEmbedding(weight, tensor=Axis("tensor"), sequence_parallel=False)
    prepare(layer)
    found = layer(torch.tensor([[MULTIPLE - 1, MULTIPLE, MULTIPLE + 1]]))[:, 0]
    assert not found[0].any()
    torch.testing.assert_close(found[1:], weight[:2])


def _loss(size: int, vocab_size: int) -> None:
    tensor = tensor_axis(size)
    rows = padded_rows(vocab_size, size, MULTIPLE)
    whole = values("logits", (S, B, rows * size)) * 5
    targets = torch.arange(S * B).view(S, B) * 11 % vocab_size
    targets[3, 1] = -100
    logits = whole[..., :vocab_size].clone().requires_grad_()
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
    )
    (expected_grad,) = torch.autograd.grad(expected, logits)

    columns = slice(rows * tensor.rank, rows * (tensor.rank + 1))
    own = whole[..., columns].clone().requires_grad_()
    weight = parameters_of([vocabulary("output", vocab_size, H)], tensor).get("output")
    loss = vocab_parallel_cross_entropy(
        own * 1.0, targets, vocabulary=own_vocabulary(weight), tensor=tensor
    )
    torch.testing.assert_close(loss.detach(), expected.detach())
    loss.backward()
    assert own.grad is not None
    own_grad = expected_grad[..., columns]
    torch.testing.assert_close(own.grad[..., : own_grad.shape[-1]], own_grad)
    assert not own.grad[..., own_grad.shape[-1] :].any()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [256, 131, 5])
def test_vocab_parallel_cross_entropy(size: int, vocab_size: int) -> None:
    run_ranks(_loss, size, size, vocab_size)
