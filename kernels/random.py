"""Randomness without a generator: each number is a pure function of a key and its place.

A generator's numbers depend on how many were drawn before, hence on the layout. Here every element
of a global tensor has its own number, whoever holds it.

    64 bits: splitmix64's finaliser (Steele et al. 2014) of key + index * golden ratio
    32 bits: lowbias32 (Wellons 2018) of a row's key and the element's index in the row

`_hash64` and `_hash32` are the same functions inside a Triton kernel, bit for bit.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_ELEMENTS = 2**20
"""Elements made at once; intermediate tensors take about 40 bytes for each."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def fold(seed: int, name: str) -> int:
    """A 63-bit key for `name` under `seed`."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal_rectangle(
    key: int,
    global_shape: Sequence[int],
    start: Sequence[int],
    shape: Sequence[int],
    *,
    std: float,
    device: torch.device | str,
) -> Tensor:
    """Rectangle [start, start + shape) of a [global_shape] tensor of N(0, std^2), in float32.

    Only the rectangle is made. Box-Muller on the 64 bits of each element's index, in float64,
    rounded to float32 (so that no last bit of a logarithm shows); no value beyond 6.7 std.
    """
    strides = [math.prod(global_shape[dim + 1 :]) for dim in range(len(global_shape))]
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    width = shape[-1]
    rows = out.view(-1, width)
    columns = torch.arange(width, dtype=torch.int64, device=device) + start[-1]
    step = max(1, CHUNK_ELEMENTS // width)
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step]
        offsets = _row_offsets(range(first, first + part.shape[0]), start, shape, strides, device)
        part.copy_(_normal(hash64(key, offsets[:, None] + columns)).mul_(std))
    return out


def _row_offsets(
    rows: range,
    start: Sequence[int],
    shape: Sequence[int],
    strides: Sequence[int],
    device: torch.device | str,
) -> Tensor:
    """Index in the global tensor at which each row (all dims but the last) of a rectangle lies."""
    rest = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=device)
    offsets = torch.zeros_like(rest)
    for dim in range(len(shape) - 2, -1, -1):
        offsets += (rest % shape[dim] + start[dim]) * strides[dim]
        rest = rest // shape[dim]
    return offsets


def hash64(key: int, index: Tensor) -> Tensor:
    """64 well mixed bits for each element of an int64 tensor, as int64."""
    x = (index + 1).mul_(_signed(_GOLDEN)).add_(_signed(key))
    x ^= (x >> 30) & ((1 << 34) - 1)  # >> keeps the sign: clear what it drags in
    x *= _signed(_MIX[0])
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _signed(_MIX[1])
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def hash32(rows: Tensor, width: int) -> Tensor:
    """[...] int64 row keys -> [..., width] int32: 31 well mixed bits for each element, >= 0."""
    columns = torch.arange(width, dtype=torch.int32, device=rows.device)
    x = rows.to(torch.int32).unsqueeze(-1) + columns * _signed32(_GOLDEN >> 32)
    x ^= (x >> 16) & 0xFFFF
    x *= _signed32(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x & 0x7FFFFFFF


@triton.jit
def _hash64(key, index):  # type: ignore[no-untyped-def]
    """hash64 in a kernel: integers that broadcast, of any type -> uint64."""
    # Unsigned, so that >> brings in zeros and nothing need be cleared.
    x = (tl.cast(index, tl.uint64) + 1) * 0x9E3779B97F4A7C15 + tl.cast(key, tl.uint64)
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    x ^= x >> 31
    return x


@triton.jit
def _hash32(row_key, column):  # type: ignore[no-untyped-def]
    """hash32 in a kernel: `_hash64`s of rows and indices in the row, of shapes that broadcast ->
    int32, >= 0."""
    x = tl.cast(row_key, tl.uint32) + tl.cast(column, tl.uint32) * 0x9E3779B9
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return tl.cast(x & 0x7FFFFFFF, tl.int32)


def _normal(bits: Tensor) -> Tensor:
    """Box-Muller in float64: a radius from the upper 32 bits, an angle from the lower."""
    upper = ((bits >> 32) & 0xFFFFFFFF).double()
    lower = (bits & 0xFFFFFFFF).double()
    radius = upper.add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    return lower.mul_(2 * math.pi * 2.0**-32).cos_().mul_(radius)


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
