"""Plan against reality: what a step took, what its program should have taken, and where the
difference went.

The plan is the program simulated with what was measured in the step itself: every action takes as
long as the median of its stage and kind, tensors travel in no time, and the executor costs nothing.
From there to what happened, one thing after the other is put into the simulation, and each is
charged with what it makes the step longer:

    uneven actions    the times that actions really took: of the ranks that lost most, one by one
    the executor      the time between two actions of a rank: posting sends and receives, Python
    late entry        ranks that began the step after the first did
    transfers         what is then left: tensors on their way, and being waited for

So the parts add up to the difference. They depend on this order, as parts of a maximum must: an
action that is slow while its rank would have waited anyway costs nothing, and is charged nothing.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from megapipe.pipeline.recording import ProgramRun
from megapipe.pipeline.schedule import (
    Action,
    Costs,
    Kind,
    Program,
    Span,
    Timeline,
    compute_only,
    simulate,
)
from megapipe.pipeline.schedule.dependencies import Numbered, completion_order, find_needs

SLOWEST = 2
"""Ranks whose uneven actions have a row of their own."""

Medians = dict[tuple[int, Kind], float]
"""Seconds of the work of a stage's actions of a kind."""


@dataclass(frozen=True)
class Reality:
    """A step as all pipeline ranks recorded it, on the clock of the first.

    `program` was lowered; `runs` has one for each of its ranks. Times may be wrong between ranks by
    `clock_error` seconds.
    """

    step: int
    program: Program
    runs: list[ProgramRun]
    clock_error: float = 0.0

    def work(self) -> Timeline:
        """The compute actions, without their waits, from 0 on."""
        rows = [
            [
                Span(action, moment.ready, moment.ended)
                for action, moment in zip(actions, run.moments, strict=True)
                if action.kind.computes
            ]
            for actions, run in zip(self.program, self.runs, strict=True)
        ]
        begin = min(spans[0].begin for spans in rows)
        return Timeline(
            [[Span(a, start - begin, end - begin) for a, start, end in spans] for spans in rows]
        )


class ComparisonRow(NamedTuple):
    """A part of a step's time; those before "the plan" add up to it, all to reality."""

    label: str
    seconds: float
    note: str = ""


class RankTimes(NamedTuple):
    """Seconds of one rank in a step, which add up to the makespan."""

    rank: int
    planned_work: float
    work: float
    waits: float  # for an arrival
    between: float  # actions: the executor's own
    outside: float  # before the first action and after the last, while others work


@dataclass(frozen=True)
class Comparison:
    """`plan_rows` add up to the plan's makespan, `reality_rows` to what reality took beyond it."""

    step: int
    plan: Timeline
    real: Timeline
    equal_bubble: float  # of the program, were all stages alike
    plan_rows: list[ComparisonRow]
    reality_rows: list[ComparisonRow]
    ranks: list[RankTimes]


# --- Costs ---------------------------------------------------------------------------------------


def median_times(spans: Iterable[Span]) -> Medians:
    """Of compute actions, by stage and kind."""
    times: dict[tuple[int, Kind], list[float]] = {}
    for span in spans:
        if span.action.kind.computes:
            times.setdefault((span.action.stage, span.action.kind), []).append(span.duration)
    return {key: median(values) for key, values in times.items()}


def measured_costs(medians: Medians, stages: int) -> Costs:
    """Costs of each stage. Where a backward is never split, all of it counts as input gradient."""

    def of(kind: Kind) -> list[float]:
        return [medians.get((stage, kind), 0.0) for stage in range(stages)]

    whole, split = of(Kind.BACKWARD), of(Kind.BACKWARD_INPUT)
    return Costs(
        forward=of(Kind.FORWARD),
        backward_input=[apart or full for apart, full in zip(split, whole, strict=True)],
        backward_weight=of(Kind.BACKWARD_WEIGHT),
    )


def equal_costs(medians: Medians, stages: int) -> Costs:
    """The same work, shared equally among the stages. Weight gradients are the part of a backward
    that they are where it is split: a program may split it at some stages only."""

    def total(kind: Kind, beside: Container[int] = ()) -> float:
        return sum(medians.get((s, kind), 0.0) for s in range(stages) if s not in beside)

    split = {stage for stage, kind in medians if kind is Kind.BACKWARD_INPUT}
    inputs, weights = total(Kind.BACKWARD_INPUT), total(Kind.BACKWARD_WEIGHT)
    backward = (inputs + weights + total(Kind.BACKWARD, beside=split)) / stages
    late = weights / (inputs + weights) if weights else 0.0
    return Costs(total(Kind.FORWARD) / stages, backward * (1 - late), backward * late)


# --- Where the difference went -------------------------------------------------------------------


def compare(reality: Reality) -> Comparison:
    """Simulates the program a handful of times: 10 us for each of its actions."""
    real = reality.work()
    program = compute_only(reality.program)
    replay = _Replay(program)
    medians = median_times(span for spans in real.spans for span in spans)
    stages = replay.stages
    costs = measured_costs(medians, stages)
    plan = simulate(program, costs)
    equal = simulate(program, equal_costs(medians, stages))
    planned = {span.action: span.duration for spans in plan.spans for span in spans}
    share = sum(planned.values()) / len(program)
    return Comparison(
        step=reality.step,
        plan=plan,
        real=real,
        equal_bubble=equal.bubble,
        plan_rows=[
            ComparisonRow("work, shared equally", share),
            ComparisonRow("bubble, were stages equal", equal.makespan - share),
            ComparisonRow("stages are not equal", plan.makespan - equal.makespan, _extremes(costs)),
        ],
        reality_rows=_reality_rows(reality, replay, planned, real, plan.makespan),
        ranks=_rank_times(reality, planned),
    )


class _Replay:
    """Simulates one program again and again, with times of its own for each action."""

    def __init__(self, program: Program) -> None:
        numbered = Numbered(program)
        needs = find_needs(numbered)
        actions, rank_of = numbered.actions, numbered.rank_of
        self.stages = len(numbered.ranks)
        self._order = [
            (rank_of[number], actions[number], [actions[need] for need in needs[number]])
            for number in completion_order(numbered, needs)
        ]
        self._ranks = len(program)

    def makespan(
        self,
        work: Mapping[Action, float],
        between: Mapping[Action, float] | None = None,
        entered: list[float] | None = None,
    ) -> float:
        """`between` is what passes before an action after the one before it."""
        between = between or {}
        free = list(entered or [0.0] * self._ranks)
        ends: dict[Action, float] = {}
        first = float("inf")
        for rank, action, needed in self._order:
            begin = max([free[rank] + between.get(action, 0.0), *(ends[need] for need in needed)])
            first = min(first, begin)
            free[rank] = ends[action] = begin + work[action]
        return max(free) - first


def _reality_rows(
    reality: Reality,
    replay: _Replay,
    planned: Mapping[Action, float],
    real: Timeline,
    makespan: float,
) -> list[ComparisonRow]:
    rows = []
    work = dict(planned)

    def charge(label: str, longer: float, note: str = "") -> None:
        nonlocal makespan
        rows.append(ComparisonRow(label, longer - makespan, note))
        makespan = longer

    lost = [sum(s.duration - planned[s.action] for s in spans) for spans in real.spans]
    ranks = sorted(range(len(lost)), key=lambda rank: -lost[rank])
    for rank in ranks[:SLOWEST]:
        work |= {span.action: span.duration for span in real.spans[rank]}
        longer = replay.makespan(work)
        note = _slowest(real.spans[rank], planned) if longer > makespan else ""
        charge(f"uneven actions, rank {rank}", longer, note)
    for rank in ranks[SLOWEST:]:
        work |= {span.action: span.duration for span in real.spans[rank]}
    if ranks[SLOWEST:]:
        charge("uneven actions, other ranks", replay.makespan(work))
    between = _between(reality)
    charge("executor, between actions", replay.makespan(work, between))
    first = min(run.entered for run in reality.runs)
    late = [run.entered - first for run in reality.runs]
    latest = max(range(len(late)), key=lambda rank: late[rank])
    note = f"rank {latest}: {_ms(late[latest])} ms after the first"
    charge("ranks that began late", replay.makespan(work, between, late), note)
    note = f"clocks agree to {_ms(reality.clock_error)} ms" if reality.clock_error else ""
    charge("transfers", real.makespan, note)
    return rows


def _between(reality: Reality) -> dict[Action, float]:
    """For each compute action, what passed since the one before it (or the entry) was done."""
    found = {}
    for actions, run in zip(reality.program, reality.runs, strict=True):
        before = run.entered
        for action, moment in zip(actions, run.moments, strict=True):
            if action.kind.computes:
                found[action] = max(0.0, moment.began - before)
                before = moment.ended
    return found


def _rank_times(reality: Reality, planned: Mapping[Action, float]) -> list[RankTimes]:
    real = reality.work()
    between = _between(reality)
    table = []
    for rank, (actions, run) in enumerate(zip(reality.program, reality.runs, strict=True)):
        own = [(a, m) for a, m in zip(actions, run.moments, strict=True) if a.kind.computes]
        first, last = own[0][1], own[-1][1]
        work = sum(moment.ended - moment.ready for _, moment in own)
        waits = sum(moment.ready - moment.began for _, moment in own[1:])
        gaps = sum(between[action] for action, _ in own[1:])
        table.append(
            RankTimes(
                rank=rank,
                planned_work=sum(planned[action] for action, _ in own),
                work=work,
                waits=waits,
                between=gaps,
                outside=real.makespan - (last.ended - first.ready),
            )
        )
    return table


# --- Notes ---------------------------------------------------------------------------------------


def _slowest(spans: list[Span], planned: Mapping[Action, float]) -> str:
    worst = max(spans, key=lambda span: span.duration - planned[span.action])
    usual = planned[worst.action]
    return f"most: {worst.action} took {_ms(worst.duration)} ms, usually {_ms(usual)}"


def _extremes(costs: Costs) -> str:
    parts = (costs.forward, costs.backward_input, costs.backward_weight)
    lists = [part for part in parts if not isinstance(part, int | float)]
    totals = [sum(times) for times in zip(*lists, strict=True)]
    least, most = min(totals), max(totals)
    if len(totals) == 1:
        return ""
    return (
        f"of a microbatch, stage {totals.index(least)} takes {_ms(least)} ms, "
        f"stage {totals.index(most)} {_ms(most)}"
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"
