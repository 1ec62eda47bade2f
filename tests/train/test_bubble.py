"""The bubble of a step, from what ranks give to its sums."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megapipe.distributed.mesh import Axis, Mesh
from megapipe.pipeline.recording import Recorder
from megapipe.pipeline.schedule import Program, Span, Timeline, build_program, lower, simulate
from megapipe.pipeline.schedule.simulate import Costs
from megapipe.step_sums import StepSums, Totals
from megapipe.train import bubble
from megapipe.train.bubble import BEGAN, BUSY, MEDIANS, BubbleMeter

COSTS = Costs(forward=[1.0, 2.0], backward_input=[1.5, 1.0], backward_weight=[0.5, 1.0])


class Recorded(Recorder):
    """Says that a run was as simulated, by a clock of its own."""

    def __init__(self, timeline: Timeline, rank: int, clock: float) -> None:
        self.row = [Span(a, b + clock, e + clock) for a, b, e in timeline.spans[rank]]

    def spans(self) -> list[Span]:
        return self.row


def mesh_of(rank: int, *, data: int = 0) -> Mesh:
    single = Mesh.single(torch.device("cpu"))
    own = {"pipeline": rank, "data": data}
    parts = {name: Axis(name, (0, 1), place) for name, place in own.items()}
    return replace(single, parts={**single.parts, **parts})


class Registered(StepSums):
    """Zeros at each place of what is registered."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def register(self, name: str, places: int = 1) -> None:
        self.values[name] = [0.0] * places


class Clock:
    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self) -> float:
        return self.times.pop(0)


def meters(program: Program, timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two ranks whose clocks differ by 1000, and which left the all-reduce before 3 s ago."""
    found = []
    for rank, clock in enumerate((50.0, 1050.0)):
        meter = BubbleMeter(mesh_of(rank), program, Recorded(timeline, rank, clock))
        monkeypatch.setattr(bubble.time, "perf_counter", Clock(clock - 3))
        meter.reduced()
        found.append(meter)
    return found


def totals_of(ranks: list[Any]) -> Totals:
    """What these ranks give, added up at each place of what the first one registers."""
    sums = Registered()
    ranks[0].register(sums)
    given = [rank.given() for rank in ranks]
    assert all(one.keys() == sums.values.keys() for one in given)
    for one in given:
        for name, values in one.items():
            for place, value in values.items():
                sums.values[name][place] += value
    return Totals(sums.values)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_measured_and_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = lower(build_program(name, pipeline=2, virtual=1, microbatches=4))
    timeline = simulate(program, COSTS)
    ranks = meters(program, timeline, monkeypatch)
    totals = totals_of(ranks)
    assert ranks[0].measured(totals) == ranks[1].measured(totals)
    assert ranks[0].measured(totals) == pytest.approx(timeline.bubble)
    monkeypatch.setattr(bubble.time, "perf_counter", Clock(0.0, 0.5))
    assert ranks[0].planned(totals) == pytest.approx(timeline.bubble), "as measured, so planned"


def test_replicas_and_the_first_step_have_nothing_to_say() -> None:
    program = lower(build_program("1f1b", pipeline=2, virtual=1, microbatches=4))
    timeline = simulate(program, COSTS)
    replica = BubbleMeter(mesh_of(0, data=1), program, Recorded(timeline, 0, 0.0))
    assert replica.given() == {}
    first = BubbleMeter(mesh_of(0), program, Recorded(timeline, 0, 0.0))
    totals = totals_of([first])
    assert first.measured(totals) is None
    assert math.isnan(totals.all(BEGAN)[0])
    values = [totals.all(name) for name in (BUSY, *MEDIANS.values())]
    assert not any(math.isnan(value) for one in values for value in one)


def test_planning_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5 s to simulate: again after 250 s. Until then the last result stands."""
    program = lower(build_program("1f1b", pipeline=2, virtual=1, microbatches=4))
    timeline = simulate(program, COSTS)
    rank, other = meters(program, timeline, monkeypatch)
    totals = totals_of([rank, other])
    monkeypatch.setattr(bubble.time, "perf_counter", Clock(0.0, 0.5, 100.0, 200.0, 251.0, 251.5))
    first = rank.planned(totals)
    values = {name: totals.all(name) for name in MEDIANS.values()}
    slower = {name: [3 * first, *others] for name, (first, *others) in values.items()}
    changed = Totals(slower)
    assert [rank.planned(changed) for _ in range(2)] == [first, first]
    assert rank.planned(changed) != first
