"""Rectangles of a tensor in a file, against slices of the tensor in memory."""

import os
from pathlib import Path

import pytest
import torch

from megapipe.conversion.strided import StridedTensor
from megapipe.errors import CheckpointError

OFFSET = 13
"""Tensors may begin anywhere in a file."""
CASES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ((), (), ()),
    ((5,), (0,), (5,)),
    ((5,), (2,), (3,)),
    ((5,), (2,), (0,)),
    ((7, 6), (0, 0), (7, 6)),
    ((7, 6), (3, 0), (2, 6)),
    ((7, 6), (0, 2), (7, 3)),
    ((7, 6), (6, 5), (1, 1)),
    ((7, 6), (2, 1), (4, 0)),
    ((4, 3, 5), (1, 0, 0), (2, 3, 5)),
    ((4, 3, 5), (1, 1, 2), (3, 2, 2)),
    ((4, 3, 5), (0, 0, 4), (4, 3, 1)),
]


@pytest.fixture(params=[(2**26, 2**20), (50, 2**20), (2**26, 8)])
def small_reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, two rows of the matrices above at a time, or as little as there is."""
    for name, value in zip(("READ_BYTES", "RUN_BYTES"), request.param, strict=True):
        monkeypatch.setattr(f"megapipe.conversion.strided.{name}", value)


def read(
    path: Path, whole: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    result = torch.empty(shape, dtype=whole.dtype)
    StridedTensor.row_major(path, OFFSET, whole.dtype, whole.shape).part(start, shape).copy_to(
        result
    )
    return result


def write(path: Path, whole: torch.Tensor) -> None:
    data = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    path.write_bytes(b"\xff" * OFFSET + data)


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "start", "shape"), CASES)
def test_any_rectangle(
    size: tuple[int, ...],
    start: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    whole = torch.randn(size).to(dtype)
    write(tmp_path / "x", whole)
    found = read(tmp_path / "x", whole, start, shape)
    expected = whole[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("start", "shape"), [((0, 0), (7, 6)), ((5, 1), (2, 5))])
def test_a_file_that_has_shrunk(
    start: tuple[int, ...], shape: tuple[int, ...], tmp_path: Path
) -> None:
    whole = torch.randn(7, 6)
    write(tmp_path / "x", whole)
    os.truncate(tmp_path / "x", OFFSET + whole.nbytes - 1)
    with pytest.raises(CheckpointError, match="1 byte too early"):
        read(tmp_path / "x", whole, start, shape)
