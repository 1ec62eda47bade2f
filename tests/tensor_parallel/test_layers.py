"""Layers cut over ranks compute what the whole layer computes: outputs, input and weight gradients.

Each rank holds its pieces of global weights that are a function of their names, and every piece's
gradient is compared with that rectangle of the whole gradient.
"""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapipe.distributed.mesh import Axis, build_mesh
from megapipe.layout.axes import Axes
from megapipe.tensor_parallel.collectives import all_reduce_, own_sequence_slice
from megapipe.tensor_parallel.embedding import VocabParallelEmbedding
from megapipe.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megapipe.tensor_parallel.loss import vocab_parallel_cross_entropy
from megapipe.tensor_parallel.parameter import Piece, sharded_parameters
from megapipe.tensor_parallel.vocabulary import VOCABULARY_MULTIPLE, vocabulary_rows
from megapipe.tensor_parallel.weight_grad import WeightGradStore
from tests.ranks import run_ranks

S, B, H, OUT = 8, 2, 12, 16
CPU, FLOAT64 = torch.device("cpu"), torch.float64


def values(name: str, shape: Sequence[int]) -> Tensor:
    """A global tensor that every rank knows."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(*shape, dtype=FLOAT64, generator=generator)


def tensor_axis(size: int) -> Axis:
    return build_mesh(Axes.of(pipeline=1, data=1, tensor=size), CPU).tensor


def prepare(module: nn.Module) -> None:
    """Global values into every piece, and a gradient buffer behind every parameter."""
    for parameter in sharded_parameters(module):
        parameter.attach_main_grad(torch.zeros_like(parameter))
        for piece in parameter.shards:
            whole = values(piece.name, piece.global_shape)
            piece.view(parameter.data).copy_(whole[cut(piece)])


def cut(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))


def check_gradients(module: nn.Module, expected: dict[str, Tensor]) -> None:
    for parameter in sharded_parameters(module):
        assert parameter.grad is None
        for piece in parameter.shards:
            found = piece.view(parameter.main_grad)
            if piece.sum_over is not None:
                found = all_reduce_(found.contiguous(), piece.sum_over)
            torch.testing.assert_close(found, expected[piece.name][cut(piece)])


def leaf(name: str, shape: Sequence[int]) -> Tensor:
    return values(name, shape).requires_grad_()


def _linear_pair(size: int, sequence_parallel: bool, deferred: bool) -> None:
    """column(x) -> relu -> row: as in a feed-forward block, two weights stacked in the first."""
    tensor, store = tensor_axis(size), WeightGradStore()
    rows = OUT // size
    pieces = [
        Piece(f"{which}.weight", (OUT, H), (rows * tensor.rank, 0), (rows, H)) for which in "ab"
    ]
    column = ColumnParallelLinear(
        H,
        pieces,
        bias=True,
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        store=store,
        dtype=FLOAT64,
        device=CPU,
    )
    row = RowParallelLinear(
        OUT,
        H,
        "row.weight",
        bias=True,
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        store=store,
        dtype=FLOAT64,
        device=CPU,
    )
    module = nn.ModuleList([column, row])
    prepare(module)

    # The whole computation.
    names = {"a.weight": (OUT, H), "b.weight": (OUT, H), "a.bias": (OUT,), "b.bias": (OUT,)}
    weights = {name: leaf(name, shape) for name, shape in names.items()}
    weights |= {"row.weight": leaf("row.weight", (H, OUT)), "row.bias": leaf("row.bias", (H,))}
    x = leaf("x", (S, B, H))
    a = F.linear(x, weights["a.weight"], weights["a.bias"])
    b = F.linear(x, weights["b.weight"], weights["b.bias"])
    y = F.linear(a.relu() * b, weights["row.weight"], weights["row.bias"])
    grad = values("grad", y.shape)
    expected = dict(
        zip(["x", *weights], torch.autograd.grad(y, [x, *weights.values()], grad), strict=True)
    )

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
    torch.testing.assert_close(own_x.grad, own(expected["x"]))
    check_gradients(module, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_column_and_row_parallel_linear(size: int, sequence_parallel: bool, deferred: bool) -> None:
    run_ranks(_linear_pair, size, size, sequence_parallel, deferred)


def _embedding(size: int, sequence_parallel: bool, vocab_size: int) -> None:
    tensor = tensor_axis(size)
    layer = VocabParallelEmbedding(
        "embedding",
        vocab_size,
        H,
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        dtype=FLOAT64,
        device=CPU,
    )
    prepare(layer)
    tokens = torch.arange(B * S).view(B, S) * 7 % vocab_size
    tokens[0, :3] = vocab_size - 1  # the last row, and one that is read more than once
    weight = leaf("embedding", (vocab_size, H))
    x = F.embedding(tokens.t(), weight)
    grad = values("grad", x.shape)
    (expected,) = torch.autograd.grad(x, weight, grad)

    own = (lambda t: own_sequence_slice(t, tensor)) if sequence_parallel else (lambda t: t)
    own_x = layer(tokens)
    torch.testing.assert_close(own_x, own(x.detach()))
    own_x.backward(own(grad))
    check_gradients(layer, {"embedding": expected})
    (piece,) = layer.weight.shards
    assert not layer.weight.main_grad[piece.shape[0] :].any(), "padding has no gradient"


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("vocab_size", [256, 131, 5])
def test_vocab_parallel_embedding(size: int, sequence_parallel: bool, vocab_size: int) -> None:
    run_ranks(_embedding, size, size, sequence_parallel, vocab_size)


def _loss(size: int, vocab_size: int) -> None:
    tensor = tensor_axis(size)
    rows = vocabulary_rows(vocab_size, size)
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
    loss = vocab_parallel_cross_entropy(own * 1.0, targets, vocab_size=vocab_size, tensor=tensor)
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


def test_vocabulary_rows_are_padded_and_hold_the_vocabulary() -> None:
    assert vocabulary_rows(50257, 1) == 50304
    for vocab_size in (1, 64, 65, 50257):
        for size in (1, 2, 3, 8):
            rows = vocabulary_rows(vocab_size, size)
            assert rows % VOCABULARY_MULTIPLE == 0
            assert rows * size >= vocab_size
