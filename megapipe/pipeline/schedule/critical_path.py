"""What a timeline is as long as: the chain of actions in which each had to wait for the one before.

To make the step faster, one of these has to become faster; all others have time to spare.
"""

from enum import StrEnum
from math import inf
from typing import NamedTuple

from megapipe.pipeline.schedule.action import COMPUTE, Action, Kind
from megapipe.pipeline.schedule.dependencies import Needs, Numbered, find_needs
from megapipe.pipeline.schedule.timeline import Span, Timeline


class Reason(StrEnum):
    """Why an action began when it did."""

    START = "start"  # nothing came before
    SAME_RANK = "same rank"  # its rank was busy with the step before, which it does not use
    DEPENDENCY = "dependency"  # it uses what its rank computed in the step before
    TRANSFER = "transfer"  # it uses a tensor that came from another rank


class Step(NamedTuple):
    rank: int
    span: Span
    reason: Reason


def critical_path(timeline: Timeline, latency: float = 0.0) -> list[Step]:
    """The compute actions that fill the makespan, in order of time.

    `latency` is what a transfer takes, as in the Costs of a simulation. There each step begins when
    the one before ends, plus the latency in a TRANSFER. (Where a RECEIVE was posted after its
    tensor was sent, the step before a TRANSFER is the one that delayed it, on the same rank.)
    Raises ScheduleError if the timeline's program is not one that can run.
    """
    program = Numbered([[span.action for span in spans] for spans in timeline.spans])
    needs = find_needs(program)
    spans = [span for rank_spans in timeline.spans for span in rank_spans]
    computing = [number for number, span in enumerate(spans) if span.action.kind in COMPUTE]
    way: list[Step] = []
    number = max(computing, key=lambda number: spans[number].end, default=None)
    while number is not None:
        before, reason = _before(number, program, needs, spans, latency)
        way.append(Step(program.rank_of[number], spans[number], reason))
        number = before
    return way[::-1]


def _before(
    number: int, program: Numbered, needs: Needs, spans: list[Span], latency: float
) -> tuple[int | None, Reason]:
    """The compute action that a compute action had to wait for, and why."""
    first = program.bounds[program.rank_of[number]]
    free = spans[number - 1].end if number > first else -inf
    travels = max(needs[number], key=lambda need: spans[need].end, default=None)
    if travels is not None and spans[travels].end + latency > free:
        return _computed(travels, program), Reason.TRANSFER
    before = _computed(number - 1, program) if number > first else None
    if before is None:
        return None, Reason.START
    uses = _uses(program.actions[number], program.actions[before])
    return before, Reason.DEPENDENCY if uses else Reason.SAME_RANK


def _computed(number: int, program: Numbered) -> int | None:
    """This action or the last before it on its rank that computes."""
    first = program.bounds[program.rank_of[number]]
    while number >= first and program.actions[number].kind not in COMPUTE:
        number -= 1
    return number if number >= first else None


def _uses(action: Action, before: Action) -> bool:
    """Whether it needs what the action before has computed, on the same rank."""
    if action.microbatch != before.microbatch:
        return False
    steps = {
        (Kind.FORWARD, Kind.FORWARD): 1,
        (Kind.FORWARD, Kind.BACKWARD): 0,
        (Kind.BACKWARD, Kind.BACKWARD): -1,
    }
    if action.kind is Kind.BACKWARD_WEIGHT:
        return before.kind is Kind.BACKWARD_INPUT and before.stage == action.stage
    whole = {Kind.BACKWARD_INPUT: Kind.BACKWARD}
    kinds = whole.get(before.kind, before.kind), whole.get(action.kind, action.kind)
    return kinds in steps and action.stage - before.stage == steps[kinds]
