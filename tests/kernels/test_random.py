"""Numbers that depend on their place alone: same in every cut, and as random as they claim."""

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe import kernels
from megapipe.kernels.dropout import keep_mask
from megapipe.kernels.random import CHUNK_ELEMENTS, _hash32, _hash64, hash32, hash64


def normal(shape: tuple[int, ...], start: tuple[int, ...], part: tuple[int, ...]) -> torch.Tensor:
    return kernels.normal_rectangle(7, shape, start, part, std=0.5, device="cpu")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_rectangle_is_that_part_of_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    start = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    part = tuple(
        data.draw(st.integers(0, size - low)) for size, low in zip(shape, start, strict=True)
    )
    whole = normal(shape, (0,) * len(shape), shape)
    cut = tuple(slice(low, low + n) for low, n in zip(start, part, strict=True))
    assert torch.equal(normal(shape, start, part), whole[cut])


def test_large_tensors_are_made_in_pieces_that_agree() -> None:
    shape = (3000, 700)
    assert shape[0] * shape[1] > CHUNK_ELEMENTS
    whole = normal(shape, (0, 0), shape)
    assert torch.equal(normal(shape, (1501, 333), (7, 300)), whole[1501:1508, 333:633])


def test_values_are_normal() -> None:
    x = normal((1000, 1000), (0, 0), (1000, 1000)).double() / 0.5
    assert abs(float(x.mean())) < 4e-3  # 4 standard errors
    assert abs(float(x.std()) - 1) < 3e-3
    assert abs(float((x**4).mean()) - 3) < 0.03
    for bound, inside in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        assert abs(float((x.abs() < bound).double().mean()) - inside) < 2e-3
    rows = (x - x.mean()) / x.std()
    assert float((rows[:-1] * rows[1:]).mean().abs()) < 4e-3, "neighbours are independent"


def test_keys_and_names_give_other_numbers() -> None:
    keys = {kernels.fold(seed, name) for seed in range(50) for name in ("a.weight", "b.weight")}
    assert len(keys) == 100
    one, other = (
        kernels.normal_rectangle(key, (64,), (0,), (64,), std=1, device="cpu") for key in (1, 2)
    )
    assert not torch.equal(one, other)


def test_hash64_is_splitmix64() -> None:
    """The first outputs of the published generator seeded with 0 and 1234567."""
    assert [v % 2**64 for v in hash64(0, torch.arange(3)).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert hash64(1234567, torch.arange(2)).tolist() == [6457827717110365317, 3203168211198807973]


@triton.jit
def _hashes(key, index, wide, narrow, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each of BLOCK indices: 64 bits of it, and 31 bits of each of 16 columns of that row."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, 16)
    keys = _hash64(key, tl.load(index + row))
    tl.store(wide + row, keys.to(tl.int64))
    places = row[:, None] * 16 + column[None, :]
    tl.store(narrow + places, _hash32(keys[:, None], column[None, :]))


@settings(deadline=None, max_examples=30)
@given(
    key=st.integers(0, 2**63 - 1) | st.integers(0, 2),
    first=st.integers(-(2**63), 2**63 - 1 - 16) | st.integers(-3, 3),
    step=st.sampled_from([0, 1]),
)
def test_hashes_in_a_kernel_have_the_same_bits(key: int, first: int, step: int) -> None:
    index = torch.arange(16) * step + first
    wide, narrow = torch.empty(16, dtype=torch.int64), torch.empty(16, 16, dtype=torch.int32)
    _hashes[(1,)](key, index, wide, narrow, BLOCK=16)
    assert torch.equal(wide, hash64(key, index))
    assert torch.equal(narrow, hash32(wide, 16))


def test_hashes_in_a_kernel_of_scalars() -> None:
    """What a kernel does: the key of a row from a program's index, in 32 bits, a key of 32 bits."""
    out = torch.empty(3, 16, dtype=torch.int32)
    _row_bits[(3,)](7, out, WIDTH=16)
    assert torch.equal(out, hash32(hash64(7, torch.arange(3)), 16))


@triton.jit
def _row_bits(key, out, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    tl.store(out + row * WIDTH + column, _hash32(_hash64(key, row), column))


def test_dropout_bits_depend_on_sample_and_position_only() -> None:
    samples = torch.tensor([5, 9, 700_000_000_000])
    whole = keep_mask(0.3, 11, samples, 12, 40, 0)
    assert torch.equal(keep_mask(0.3, 11, samples, 6, 40, 6), whole[6:])
    assert torch.equal(keep_mask(0.3, 11, samples[1:], 12, 40, 0), whole[:, 1:])
    assert not torch.equal(keep_mask(0.3, 12, samples, 12, 40, 0), whole)


def test_dropout_keeps_the_share_it_says_and_the_mean() -> None:
    samples = torch.arange(16)
    keep = keep_mask(0.2, 3, samples, 64, 256, 0)
    assert abs(float(keep.float().mean()) - 0.8) < 0.003
    for dim in range(3):  # no row, sample or feature stands out
        shares = keep.float().mean([d for d in range(3) if d != dim])
        assert float((shares - 0.8).abs().max()) < 0.06
    x = torch.ones(64, 16, 256, dtype=torch.float64, requires_grad=True)
    y = kernels.dropout(x, 0.2, 3, samples, 0)
    assert torch.equal(y != 0, keep)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach()), "the gradient is dropped and scaled alike"
    residual = torch.full_like(x, 2.0)
    assert torch.equal(kernels.dropout_add(x, residual, 0.2, 3, samples, 0), y + 2)


def test_attention_dropout_of_a_head_is_the_same_whoever_holds_it() -> None:
    samples = torch.tensor([3, 8])
    whole = kernels.attention_dropout_mask(0.1, 5, samples, heads=range(4), length=16)
    part = kernels.attention_dropout_mask(0.1, 5, samples[1:], heads=range(2, 4), length=16)
    assert whole.shape == (2, 4, 16, 16)
    assert torch.equal(part, whole[1:, 2:])
    assert abs(float(whole.float().mean()) - 0.9) < 0.02
