"""Offsets of clocks that are known to be off."""

import time

import pytest
import torch

from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.layout.axes import Axes
from megapipe.pipeline import clocks
from megapipe.pipeline.clocks import ClockOffset, _between, clock_offsets
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def measure(shifts: list[float]) -> list[ClockOffset]:
    mesh = build_mesh(Axes.of(pipeline=len(shifts)), CPU)
    shift = shifts[mesh.pipeline.rank]
    honest = clocks.perf_counter
    clocks.perf_counter = lambda: time.perf_counter() + shift  # type: ignore[assignment]
    try:
        return clock_offsets(mesh.pipeline, CPU)
    finally:
        clocks.perf_counter = honest


def test_offsets_lie_within_their_error_and_all_ranks_know_them() -> None:
    shifts = [5.0, -3.0, 1234.5]
    answers = run_ranks(measure, 3, shifts)
    assert answers[0] == answers[1] == answers[2]
    for offset, shift in zip(answers[0], shifts, strict=True):
        assert abs(offset.seconds - (shift - shifts[0])) <= offset.error
        assert offset.error < 1.0


def test_ranks_of_one_host_have_one_clock() -> None:
    """Linux gives all processes the same; the bounds must contain it, and then it is taken."""
    for offsets in run_ranks(measure, 3, [0.0, 0.0, 0.0]):
        assert [offset.seconds for offset in offsets] == [0.0, 0.0, 0.0]


def test_bounds() -> None:
    assert _between(0.9, 1.1) == pytest.approx((1.0, 0.1))
    assert _between(-0.1, 0.2).seconds == 0.0


def test_one_rank_alone() -> None:
    (offset,) = clock_offsets(Mesh.single(CPU).pipeline, CPU)
    assert offset.seconds == 0.0
