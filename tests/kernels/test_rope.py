"""Rotary positions: the Triton kernel against torch and float64, new tensors and in place."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapipe.kernels import Backend, UnsupportedError, rope, rope_qkv_
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)


def table(length: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * 10.0 ** -torch.arange(half)
    return angles.cos(), angles.sin()


def inputs(
    length: int, batch: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> Tensor:
    generator = torch.Generator().manual_seed(length + width)
    return torch.randn(length, batch, heads + 2 * kv_heads, width, generator=generator).to(dtype)


def turned(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    positions: Tensor | None = None,
    backend: Backend = "torch",
) -> tuple[Tensor, ...]:
    """Queries and keys are views of the projection's output."""
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=2)
    cos, sin = (x.to(qkv.dtype) for x in table(20, qkv.shape[-1] // 2))
    return rope(q, k, cos, sin, positions_SB=positions, backend=backend)


@settings(max_examples=15, deadline=None)
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
    qkv = inputs(*shape, heads, kv_heads, 2 * half, dtype)
    positions = (torch.arange(shape[0] * shape[1]) * 7 % 20).view(shape) if packed else None
    function = partial(turned, heads=heads, kv_heads=kv_heads, positions=positions)
    kernel = values_and_gradients(partial(function, backend="triton"), (qkv,))
    reference = values_and_gradients(function, (qkv,))
    assert_as_accurate(kernel, reference, values_and_gradients(function, (qkv.double(),)))


@pytest.mark.parametrize("packed", [False, True])
def test_in_place(packed: bool) -> None:
    """Queries, keys and values of what a projection gave out, and its gradient, are the same."""
    qkv = inputs(5, 2, 4, 2, 8, torch.float32)
    cos, sin = table(20, 4)
    positions = torch.arange(10, dtype=torch.int32).view(5, 2) if packed else None
    found = {}
    backends: tuple[Backend, ...] = ("torch", "triton")
    for backend in backends:

        def projected(x: Tensor, backend: Backend = backend) -> tuple[Tensor, ...]:
            y = x * 1
            parts = rope_qkv_(y, 4, 2, cos, sin, positions_SB=positions, backend=backend)
            assert (parts[0].data_ptr() == y.data_ptr()) == (backend == "triton")
            return tuple(part.square() for part in parts)

        found[backend] = values_and_gradients(projected, (qkv,))
    for own, other in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(own, other)


def test_in_place_gradients_of_a_sum() -> None:
    """They are expanded: in memory there is one number."""
    qkv, (cos, sin) = inputs(3, 2, 4, 2, 8, torch.float32), table(3, 4)
    found = []
    backends: tuple[Backend, ...] = ("torch", "triton")
    for backend in backends:
        x = qkv.clone().requires_grad_()
        sum(part.sum() for part in rope_qkv_(x * 1, 4, 2, cos, sin, backend=backend)).backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_any_order_and_many_heads() -> None:
    """More heads than a program turns at once."""
    qkv = inputs(2, 2, 40, 2, 128, torch.float32)
    function = partial(turned, heads=40, kv_heads=2, backend="triton")
    in_order = values_and_gradients(function, (qkv,))
    torch.testing.assert_close(in_order[0], turned(qkv, 40, 2)[0])
    with programs_in_reverse():
        assert_same_bits(in_order, values_and_gradients(function, (qkv,)))


def test_refusals() -> None:
    q, (cos, sin) = torch.zeros(3, 1, 2, 8), table(3, 4)
    with pytest.raises(UnsupportedError, match="float64"):
        rope(q.double(), q.double(), cos, sin, backend="triton")
    with pytest.raises(UnsupportedError, match="width 7"):
        rope(q[..., :7], q[..., :7], cos, sin, backend="triton")


def test_operators() -> None:
    qkv = inputs(3, 2, 4, 2, 8, torch.float32)
    q, k, _ = (x.clone().requires_grad_() for x in qkv.split([4, 2, 2], dim=2))
    torch.library.opcheck(torch.ops.megapipe.rope, (q, k, *table(3, 4), None, False))
    torch.library.opcheck(torch.ops.megapipe.rope_, (qkv, 4, 2, *table(3, 4), None))
    parts = qkv.split([4, 2, 2], dim=2)
    torch.library.opcheck(torch.ops.megapipe.rope_gradient, (*parts, *table(3, 4), None))
