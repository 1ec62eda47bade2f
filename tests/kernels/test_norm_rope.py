"""QK-norm and rotary positions in one: the Triton kernel against torch and float64."""

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import Backend, UnsupportedError, norm_rope
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)
from tests.kernels.test_rope import inputs, table

MODULE = sys.modules["megapipe.kernels.norm_rope"]


def turned(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    heads: int,
    positions: Tensor | None = None,
    backend: Backend = "torch",
) -> tuple[Tensor, ...]:
    """Queries and keys are views of the projection's output."""
    kv_heads = (qkv.shape[2] - heads) // 2
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=2)
    cos, sin = (x.to(qkv.dtype) for x in table(20, qkv.shape[-1] // 2))
    return norm_rope(
        q, k, q_weight, k_weight, cos, sin, 1e-5, positions_SB=positions, backend=backend
    )


def weights(width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(width, generator=generator).to(dtype) for _ in range(2)]


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 3)),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    half=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    packed=st.booleans(),
)
def test_as_accurate_as_torch(
    shape: tuple[int, int], group: int, kv_heads: int, half: int, dtype: torch.dtype, packed: bool
) -> None:
    heads = group * kv_heads
    given_ = [inputs(*shape, heads, kv_heads, 2 * half, dtype), *weights(2 * half, dtype)]
    positions = (torch.arange(shape[0] * shape[1]) * 7 % 20).view(shape) if packed else None
    function = partial(turned, heads=heads, positions=positions)
    kernel = values_and_gradients(partial(function, backend="triton"), given_)
    reference = values_and_gradients(function, given_)
    exact = values_and_gradients(function, [x.double() for x in given_])
    assert_as_accurate(kernel, reference, exact)


def test_more_tokens_than_programs_and_heads_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "PROGRAMS", 3)
    monkeypatch.setattr(sys.modules["megapipe.kernels.rope"], "TILE", 8)
    given_ = [inputs(2, 2, 3, 1, 8, torch.float32), *weights(8, torch.float32)]
    function = partial(turned, heads=3)
    kernel = values_and_gradients(partial(function, backend="triton"), given_)
    exact = values_and_gradients(function, [x.double() for x in given_])
    assert_as_accurate(kernel, values_and_gradients(function, given_), exact)
    with programs_in_reverse():
        again = values_and_gradients(partial(function, backend="triton"), given_)
    assert_same_bits(kernel, again)


def test_refusals() -> None:
    q, weight, (cos, sin) = torch.zeros(3, 1, 2, 8), torch.zeros(8), table(3, 4)
    with pytest.raises(UnsupportedError, match="float64"):
        norm_rope(q.double(), q.double(), weight, weight, cos, sin, 1e-5, backend="triton")


def test_operator() -> None:
    q, k, _ = inputs(3, 2, 4, 2, 8, torch.float32).split([4, 2, 2], dim=2)
    leaves = [x.clone().requires_grad_() for x in (q, k, *weights(8, torch.float32))]
    torch.library.opcheck(torch.ops.megapipe.norm_rope, (*leaves, *table(3, 4), None, 1e-5))
