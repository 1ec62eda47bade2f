"""Flash attention: the Triton kernels against torch and float64, under every mask."""

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import (
    Backend,
    UnsupportedError,
    attention,
    attention_dropout_mask,
    document_bounds,
)
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)

SETTINGS = sys.modules["megapipe.kernels.attention_settings"]


def small_blocks(patch: pytest.MonkeyPatch) -> None:
    """So that short sequences have blocks of each kind: hidden, cut and whole."""
    sizes = {"forward": (32, 16), "queries": (16, 32), "keys": (16, 32), "delta": (32, 0)}
    patch.setattr(SETTINGS, "settings", lambda kernel, *_: SETTINGS.Settings(*sizes[kernel], 4, 1))


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


def inputs(
    batch: int, heads: int, kv_heads: int, length: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    """Views of one projection, as the model has them."""
    generator = torch.Generator().manual_seed(length + width)
    qkv = torch.randn(length, batch, heads + 2 * kv_heads, width, generator=generator).to(dtype)
    return [x.permute(1, 2, 0, 3) for x in qkv.split([heads, kv_heads, kv_heads], dim=2)]


def documents(batch: int, length: int) -> Tensor:
    """Ends at places that differ by sample and are multiples of no block."""
    positions = torch.arange(length)
    return torch.stack([(positions + 5 * b) // (13 + b) for b in range(batch)])


def compare(given_: list[Tensor], **options: object) -> None:
    function = partial(attention, **options)  # type: ignore[arg-type]
    kernel = values_and_gradients(partial(function, backend="triton"), given_)
    reference = values_and_gradients(partial(function, backend="torch"), given_)
    exact = values_and_gradients(partial(function, backend="torch"), [x.double() for x in given_])
    assert_as_accurate(kernel, reference, exact)


DROPOUT = {"dropout": 0.3, "dropout_key": 12345678901234567, "first_head": 3}


@pytest.mark.usefixtures("_small_blocks")
@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 2),
    group=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    length=st.just(0) | st.integers(16, 70),
    width=st.integers(2, 24),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    window=st.none() | st.integers(1, 80),
    packed=st.booleans(),
    dropout=st.sampled_from([{}, DROPOUT]),
)
def test_as_accurate_as_torch(
    batch: int,
    group: int,
    kv_heads: int,
    length: int,
    width: int,
    dtype: torch.dtype,
    window: int | None,
    packed: bool,
    dropout: dict[str, object],
) -> None:
    compare(
        inputs(batch, group * kv_heads, kv_heads, length, width, dtype),
        window=window,
        bounds_2BS=document_bounds(documents(batch, length)) if packed else None,
        samples_B=torch.arange(batch) + 2**40,
        **dropout,
    )


MASKS: dict[str, dict[str, object]] = {
    "causal": {},
    "scaled": {"scale": 0.7},
    "window": {"window": 20},
    "documents": {"bounds_2BS": document_bounds(documents(1, 67))},
    "dropout": {"samples_B": torch.tensor([2**40]), **DROPOUT},
}


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("mask", MASKS)
def test_each_mask(mask: str) -> None:
    """Four query heads on two key/value heads."""
    compare(inputs(1, 4, 2, 67, 16, torch.float16), **MASKS[mask])


@pytest.mark.parametrize(("width", "dtype"), [(128, torch.float16), (256, torch.float32)])
def test_the_blocks_that_run_on_gpus(width: int, dtype: torch.dtype) -> None:
    compare(inputs(1, 2, 1, 70, width, dtype), window=33)


@pytest.mark.usefixtures("_small_blocks")
def test_dropout_keeps_what_its_mask_says() -> None:
    """With equal scores and one column for each key, the output is the mask."""
    length, heads = 24, 2
    q = torch.zeros(1, heads, length, length)
    v = torch.eye(length).expand(1, 1, -1, -1)
    samples_B = torch.tensor([77])
    out = attention(
        q, v, v, dropout=0.4, dropout_key=9, samples_B=samples_B, first_head=5, backend="triton"
    )
    mask = attention_dropout_mask(0.4, 9, samples_B, heads=range(5, 5 + heads), length=length)
    assert torch.equal(out != 0, mask.tril())
    counts = torch.arange(1, length + 1)[:, None]
    torch.testing.assert_close(out, mask.tril() / (0.6 * counts))


@pytest.mark.usefixtures("_small_blocks")
def test_blocks_of_other_documents_are_not_visited() -> None:
    """NaNs in the first document, which ends where blocks do, reach nothing of the second."""
    q, k, v = (x.clone() for x in inputs(1, 2, 1, 80, 8, torch.float32))
    for x in (q, k, v):
        x[:, :, :32] = torch.nan
    bounds = document_bounds((torch.arange(80) >= 32).long()[None])
    function = partial(attention, bounds_2BS=bounds, backend="triton")
    found = values_and_gradients(function, (q, k, v))
    second = values_and_gradients(
        partial(attention, backend="triton"), (q[:, :, 32:], k[:, :, 32:], v[:, :, 32:])
    )
    assert_same_bits([found[0][:, :, 32:]], second[:1])
    for x in found:
        assert x[:, :, 32:].isfinite().all()


@pytest.mark.usefixtures("_small_blocks")
def test_one_token_sees_itself() -> None:
    q, k, v = inputs(2, 2, 1, 1, 8, torch.float32)
    assert torch.equal(attention(q, k, v, backend="triton"), v.expand(-1, 2, -1, -1))


@pytest.mark.usefixtures("_small_blocks")
def test_strides() -> None:
    """Of contiguous inputs, and of gradients that are one number or transposed."""
    given_ = [x.contiguous() for x in inputs(2, 2, 1, 33, 8, torch.float32)]
    for reduce in (
        Tensor.sum,
        lambda y: (y.mT.contiguous().mT ** 2).sum(),
        lambda y: y[..., 0].sum(),
    ):
        found = []
        for backend in ("triton", "torch"):
            leaves = [x.clone().requires_grad_() for x in given_]
            loss = reduce(attention(*leaves, window=9, backend=backend))
            found.append(torch.autograd.grad(loss, leaves))
        torch.testing.assert_close(*found)


@pytest.mark.usefixtures("_small_blocks")
def test_any_order() -> None:
    given_ = inputs(1, 2, 1, 35, 8, torch.float32)
    function = partial(
        attention,
        window=20,
        bounds_2BS=document_bounds(documents(1, 35)),
        dropout=0.3,
        samples_B=torch.arange(1),
        backend="triton",
    )
    in_order = values_and_gradients(function, given_)
    assert in_order[0].permute(2, 0, 1, 3).is_contiguous(), "as the next layer reads it"
    with programs_in_reverse():
        assert_same_bits(in_order, values_and_gradients(function, given_))


@pytest.mark.usefixtures("_small_blocks")
def test_not_finite_as_torch() -> None:
    """A NaN in a key reaches the queries that see it, and the gradients of what they see."""
    q, k, v = inputs(1, 1, 1, 40, 8, torch.float32)
    k[0, 0, 20, 3] = torch.nan
    backends: tuple[Backend, ...] = ("triton", "torch")
    found = [values_and_gradients(partial(attention, backend=b), (q, k, v)) for b in backends]
    assert torch.equal(found[0][0].isnan(), found[1][0].isnan())
    assert found[0][0][0, 0, 20:].isnan().all()
    assert found[0][0][0, 0, :20].isfinite().all()


def test_document_bounds() -> None:
    bounds = document_bounds(torch.tensor([[4, 4, 5, 5, 5], [0, 1, 1, 2, 2]]))
    assert bounds.tolist() == [
        [[0, 0, 2, 2, 2], [0, 1, 1, 3, 3]],
        [[2, 2, 5, 5, 5], [1, 3, 3, 5, 5]],
    ]


def test_refusals() -> None:
    q = torch.zeros(1, 1, 4, 8)
    wide = torch.zeros(1, 1, 4, 257)
    for arguments, said in (
        ((q.double(), q.double(), q.double()), "float64"),
        ((wide, wide, wide), "heads of width 257 are above 256"),
        ((q[:, :, 2:], q, q), "4 keys for 2 queries"),
        ((q, q.half(), q.half()), "dtypes"),
        ((q, q.mT.contiguous().mT, q), "strides"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            attention(*arguments, backend="triton")

    with pytest.raises(UnsupportedError, match=r"scale 0\.0 is not positive"):
        attention(q, q, q, scale=0.0, backend="triton")


def test_operator() -> None:
    q, k, v = (x.clone().requires_grad_() for x in inputs(1, 2, 1, 6, 8, torch.float32))
    bounds = document_bounds(documents(1, 6))
    masked = (q, k, v, 0.3, 3, bounds, 0.2, 5, torch.arange(1), 1)
    torch.library.opcheck(torch.ops.megapipe.attention, masked)
