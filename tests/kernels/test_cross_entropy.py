"""Cross-entropy's halves, and with the output projection: Triton against torch and float64."""

import sys
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapipe.kernels import (
    Backend,
    Combined,
    UnsupportedError,
    cross_entropy,
    cross_entropy_gradient_,
    cross_entropy_stats_,
    linear_cross_entropy,
    rescale,
)
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)

MODULE = sys.modules["megapipe.kernels.cross_entropy"]


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which every third is ignored."""
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (3 * torch.randn(rows, columns, generator=generator)).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[2::3] = -100
    return logits, targets


def loss(logits: Tensor, targets: Tensor, backend: Backend = "torch", z: float = 0.0) -> Tensor:
    return cross_entropy(logits, targets, z_loss=z, backend=backend)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 6),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    z=st.sampled_from([0.0, 1e-2]),
)
def test_as_accurate_as_torch(rows: int, columns: int, dtype: torch.dtype, z: float) -> None:
    logits, targets = inputs(rows, columns, dtype)
    kernel = values_and_gradients(partial(loss, backend="triton", z=z), (logits, targets))
    reference = values_and_gradients(partial(loss, z=z), (logits, targets))
    exact = values_and_gradients(partial(loss, z=z), (logits.double(), targets))
    assert_as_accurate(kernel, reference, exact)


@pytest.mark.parametrize("z", [0.0, 0.1])
def test_formula_against_autograd(z: float) -> None:
    """Value and gradient, alone and with the projection, from operations of torch's own."""
    logits, targets = inputs(9, 30)
    hidden, weight = torch.randn(9, 16).double(), torch.randn(30, 16).double()

    def formula(logits: Tensor) -> Tensor:
        counted = targets >= 0
        lse = logits[counted].logsumexp(1)
        at_target = logits[counted, targets[counted]]
        return (lse - at_target + z * lse.square()).sum()

    alone = values_and_gradients(partial(loss, z=z), (logits.double(), targets))
    pairs = [(alone, values_and_gradients(formula, [logits.double()]))]
    fused = values_and_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, z_loss=z, backend="torch"),
        (hidden, weight),
    )
    pairs.append((fused, values_and_gradients(lambda h, w: formula(h @ w.t()), (hidden, weight))))
    for own, expected in pairs:
        for one, other in zip(own, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_many_blocks_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "BLOCK", 32)
    given_ = inputs(4, 131)
    kernel = values_and_gradients(partial(loss, backend="triton", z=1e-2), given_)
    exact = values_and_gradients(partial(loss, z=1e-2), (given_[0].double(), given_[1]))
    assert_as_accurate(kernel, values_and_gradients(partial(loss, z=1e-2), given_), exact)
    with programs_in_reverse():
        again = values_and_gradients(partial(loss, backend="triton", z=1e-2), given_)
    assert_same_bits(kernel, again)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logits_are_kept_unless_given_away(backend: Backend) -> None:
    logits, targets = inputs(3, 20)
    kept = logits.clone()
    values_and_gradients(partial(loss, backend=backend), (logits, targets))
    leaf = kept.clone().requires_grad_()
    cross_entropy(leaf, targets, backend=backend).backward()
    assert torch.equal(leaf.detach(), kept)
    gradient = leaf.grad
    again = kept.clone()
    given_away = again.clone().requires_grad_() * 1  # not a leaf, as logits are
    cross_entropy(given_away, targets, overwrite=True, backend=backend).backward()
    assert gradient is not None
    assert torch.equal(given_away.detach(), gradient)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_part_of_the_vocabulary(backend: Backend) -> None:
    """Columns 8-12 of classes 10-14 are padding; one row is all minus infinity, targets are
    elsewhere, here, and in the padding's place."""
    logits, _ = inputs(4, 12)
    logits[1] = -torch.inf
    targets = torch.tensor([12, 11, 3, 19])
    found = cross_entropy_stats_(logits.clone(), targets, first=10, valid=8, backend=backend)
    part = logits[:, :8]
    assert torch.equal(found[0], part.amax(1))
    torch.testing.assert_close(
        found[1][[0, 2, 3]], (part - part.amax(1)[:, None]).exp().sum(1)[[0, 2, 3]]
    )
    assert found[1][1] == 0
    assert torch.equal(found[2], torch.tensor([logits[0, 2], -torch.inf, 0, 0]))
    nothing = cross_entropy_stats_(logits.clone(), targets, first=90, valid=0, backend=backend)
    assert torch.equal(nothing[0], torch.full((4,), -torch.inf))
    assert not nothing[1].any()
    assert not nothing[2].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("block", [8, 4096])
def test_gradient_of_parts_with_padding(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, block: int
) -> None:
    """Classes 0-9 and 10-17, each with padding that holds NaN; a target of the second part stands
    in the place of the first one's padding."""
    monkeypatch.setattr(MODULE, "BLOCK", block)
    whole, targets = inputs(6, 18)
    targets[:5] = torch.tensor([12, 3, -100, 17, 10])
    z, grad, padding = 1e-2, torch.tensor(0.7), torch.full((6, 4), torch.nan)
    exact = whole.double().requires_grad_()
    (grad * cross_entropy(exact, targets, z_loss=z, backend="torch")).backward()
    assert exact.grad is not None
    cuts = [(0, 10), (10, 18)]
    parts = [torch.cat([whole[:, a:b], padding], 1) for a, b in cuts]
    own = [
        cross_entropy_stats_(part, targets, first=a, valid=b - a, backend=backend)
        for part, (a, b) in zip(parts, cuts, strict=True)
    ]
    max_N = torch.maximum(own[0][0], own[1][0])
    scales = [rescale(one[0], max_N) for one in own]
    sum_N = sum(one[1] * scale for one, scale in zip(own, scales, strict=True))
    assert isinstance(sum_N, Tensor)
    for part, one, scale, (a, b) in zip(parts, own, scales, cuts, strict=True):
        found = Combined(max_N + sum_N.log(), scale / sum_N, own[0][2] + own[1][2])
        settings_ = {"first": a, "valid": b - a, "grad": grad, "z_loss": z, "backend": backend}
        cross_entropy_gradient_(part, one[0], found, targets, **settings_)
        torch.testing.assert_close(part[:, : b - a].double(), exact.grad[:, a:b], rtol=0, atol=1e-6)
        assert torch.equal(part[:, b - a :], torch.zeros_like(padding))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_as_torch(value: float) -> None:
    logits, targets = inputs(3, 40)
    logits[1, 7] = value
    kernel = values_and_gradients(partial(loss, backend="triton"), (logits, targets))
    reference = values_and_gradients(loss, (logits, targets))
    for own, other in zip(kernel, reference, strict=True):
        assert torch.equal(own.isfinite(), other.isfinite())


def test_refusals() -> None:
    for function in (cross_entropy, partial(linear_cross_entropy, torch.zeros(2, 3).double())):
        with pytest.raises(UnsupportedError, match="float64"):
            function(torch.zeros(2, 3).double(), torch.zeros(2).long(), backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_columns_first(backend: Backend) -> None:
    logits, targets = inputs(5, 7)
    hidden, weight = torch.randn(5, 16).t().contiguous().t(), torch.randn(7, 16)
    turned = logits.t().contiguous().t()
    own, expected = (
        values_and_gradients(partial(loss, backend=backend), (x, targets)) for x in (turned, logits)
    )
    assert_same_bits(own, expected)

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, backend=backend)

    own = values_and_gradients(fused, (hidden, weight.t().contiguous().t()))
    for one, other in zip(
        own, values_and_gradients(fused, (hidden.contiguous(), weight)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_columns_first_cannot_be_overwritten_by_triton() -> None:
    logits, targets = inputs(5, 7)
    turned = logits.t().contiguous().t()
    with pytest.raises(UnsupportedError, match="side by side"):
        cross_entropy(turned, targets, overwrite=True, backend="triton")


class LiveLogits(TorchDispatchMode):
    """The most elements of [rows, columns] tensors that were there at one time."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.most = columns, 0
        self.made: list[tuple[weakref.ref[Tensor], int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == self.columns:
            self.made.append((weakref.ref(out), out.data_ptr(), out.numel()))
        live = {place: size for one, place, size in self.made if one() is not None}
        self.most = max(self.most, sum(live.values()))
        return out


@pytest.mark.parametrize("with_gradients", [False, True])
def test_one_part_of_the_logits_at_a_time(
    monkeypatch: pytest.MonkeyPatch, with_gradients: bool
) -> None:
    monkeypatch.setattr(sys.modules["megapipe.kernels.linear_cross_entropy"], "LEAST_ROWS", 4)
    rows, columns = 64, 500
    hidden, weight = torch.randn(rows, 1), torch.randn(columns, 1)  # W^T counts: one row
    targets = torch.randint(columns, (rows,))
    with torch.set_grad_enabled(with_gradients), LiveLogits(columns) as live:
        linear_cross_entropy(hidden, weight.requires_grad_(), targets, backend="torch")
    assert live.most <= (rows // 16 + 1) * columns
    with LiveLogits(columns) as control:
        cross_entropy(hidden @ weight.t(), targets, backend="torch")
    assert control.most >= rows * columns


def test_operators() -> None:
    logits, targets = inputs(3, 40)
    torch.library.opcheck(torch.ops.megapipe.cross_entropy_stats, (logits, targets, 0, 38))
    per_row = [torch.rand(3) for _ in range(3)]
    arguments = (logits, *per_row, targets, torch.ones(()), 0, 38, 1e-3)
    torch.library.opcheck(torch.ops.megapipe.cross_entropy_gradient_, arguments)


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    z=st.sampled_from([0.0, 1e-2]),
)
def test_with_the_projection(rows: int, columns: int, dtype: torch.dtype, z: float) -> None:
    """In parts of 8 rows; the unfused way is torch's own cross-entropy."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 16, generator=generator).to(dtype)
    weight = torch.randn(columns, 16, generator=generator).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[2::3] = -100

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(hidden @ weight.t(), targets, z_loss=z, backend="torch")

    def fused(hidden: Tensor, weight: Tensor, backend: Backend = "torch") -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, z_loss=z, backend=backend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["megapipe.kernels.linear_cross_entropy"], "LEAST_ROWS", 8)
        kernel = values_and_gradients(partial(fused, backend="triton"), (hidden, weight))
        exact = values_and_gradients(fused, (hidden.double(), weight.double()))
    unfused = values_and_gradients(whole, (hidden.double(), weight.double()))
    for own, other in zip(exact, unfused, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    if columns > 3:  # of fewer, gradients are next to nothing and their errors luck
        assert_as_accurate(kernel, values_and_gradients(whole, (hidden, weight)), exact)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_of_each_target(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, fused: bool
) -> None:
    """In parts of 4 rows where fused. Ignored targets have 0, and to ask changes no bit of the sum
    or of the gradients."""
    monkeypatch.setattr(sys.modules["megapipe.kernels.linear_cross_entropy"], "LEAST_ROWS", 4)
    hidden, (_, targets) = torch.randn(10, 16), inputs(10, 30)
    weight, each, z = torch.randn(30, 16), torch.full((10,), torch.nan), 1e-2

    def asked(hidden: Tensor, weight: Tensor, losses_N: Tensor | None = None) -> Tensor:
        more = {"z_loss": z, "losses_N": losses_N, "backend": backend}
        if fused:
            return linear_cross_entropy(hidden, weight, targets, **more)
        return cross_entropy(hidden @ weight.t(), targets, **more)

    own = values_and_gradients(partial(asked, losses_N=each), (hidden, weight))
    assert_same_bits(own, values_and_gradients(asked, (hidden, weight)))
    logits = hidden.double() @ weight.double().t()
    exact = F.cross_entropy(logits, targets, reduction="none")
    exact += torch.where(targets >= 0, z * logits.logsumexp(1).square(), 0)
    assert not each[targets < 0].any()
    torch.testing.assert_close(each.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own[0], each.sum())


@pytest.mark.parametrize("target", [5, -1])
def test_a_class_that_does_not_exist(target: int) -> None:
    targets = torch.tensor([-100, 4, target])
    with pytest.raises(RuntimeError, match="a target is neither ignored nor in 0 to 4"):
        cross_entropy(torch.zeros(3, 5), targets)
    with pytest.raises(RuntimeError, match="a target is neither ignored nor in 0 to 4"):
        linear_cross_entropy(torch.zeros(3, 2), torch.zeros(5, 2), targets)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weight_gradient_is_a_wide_sum(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Of a part that gives 0.75 and fifteen that give less than half a unit in its last place."""
    monkeypatch.setattr(sys.modules["megapipe.kernels.linear_cross_entropy"], "LEAST_ROWS", 1)
    hidden = torch.full((16, 16), 2.0**-12, dtype=torch.float16)
    hidden[0] = 1
    weight = torch.zeros(4, 16, dtype=torch.float16, requires_grad=True)  # each class has 1 / 4
    linear_cross_entropy(hidden, weight, torch.zeros(16).long(), backend=backend).backward()
    assert weight.grad is not None
    expected = torch.full((16,), -0.75 * (1 + 15 * 2.0**-12), dtype=torch.float16)
    assert_same_bits([weight.grad[0]], [expected])


def test_rows_are_cut_into_sixteen_parts_at_most() -> None:
    parts = sys.modules["megapipe.kernels.linear_cross_entropy"].row_parts
    assert [part.stop - part.start for part in parts(2500)] == [1024, 1024, 452]
    assert [part.stop - part.start for part in parts(32770)] == [2049] * 15 + [2035]
    assert parts(0) == []
