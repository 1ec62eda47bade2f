"""Adds communication to a program: a SEND after each action whose result another rank needs, and
its RECEIVE on that rank, early enough that no SEND ever has to wait for it."""

from bisect import bisect_left
from typing import NamedTuple

from megapipe.pipeline.schedule.action import Action, Kind, Program, sequential
from megapipe.pipeline.schedule.dependencies import Dependencies
from megapipe.pipeline.schedule.simulate import simulate
from megapipe.pipeline.schedule.timeline import Span

_RECEIVED_FOR = {
    Kind.FORWARD: Kind.RECEIVE_FORWARD,
    Kind.BACKWARD: Kind.RECEIVE_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.RECEIVE_BACKWARD,
}
_SENT_AFTER = {
    Kind.FORWARD: Kind.SEND_FORWARD,
    Kind.BACKWARD: Kind.SEND_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.SEND_BACKWARD,
}


class _Transfer(NamedTuple):
    """A tensor on its way: RECEIVE `receive` is posted before the `slot`-th compute action."""

    sent: float
    slot: int
    receive: Action
    source: int


def lower(program: Program) -> Program:
    """The program with SEND and RECEIVE actions; stages on one rank need none between them.

    A RECEIVE stands one compute action before the one that uses it, or earlier: before the action
    that is running when, in the simulated timeline, the tensor is sent. There every SEND finds its
    RECEIVE posted. Since the timeline is one order in which everything completes even if each SEND
    blocks, the result has no deadlock however fast the ranks really are (`completion_order` says
    why). Between two ranks receives are in the order of sends, as communicators without tags need.

    Raises ScheduleError for a program that can't finish even with unlimited buffers.
    """
    assert all(action.kind.computes for actions in program for action in actions), (
        "the program was lowered before"
    )
    program = sequential(program)
    dependencies = Dependencies(program)
    timeline = simulate(program)
    ends = {span.action: span.end for spans in timeline.spans for span in spans}
    return [_lower_rank(spans, dependencies, ends) for spans in timeline.spans]


def _lower_rank(
    spans: list[Span], dependencies: Dependencies, ends: dict[Action, float]
) -> list[Action]:
    slots: list[list[Action]] = [[] for _ in spans]
    for transfer in _in_send_order(_transfers(spans, dependencies, ends)):
        slots[transfer.slot].append(transfer.receive)
    lowered = []
    for receives, span in zip(slots, spans, strict=True):
        lowered += [*receives, span.action, *_sends(span.action, dependencies)]
    return lowered


def _transfers(
    spans: list[Span], dependencies: Dependencies, ends: dict[Action, float]
) -> list[_Transfer]:
    """What this rank receives."""
    own_ends = [span.end for span in spans]
    transfers = []
    for index, (action, _, _) in enumerate(spans):
        kind = _RECEIVED_FOR.get(action.kind)
        if kind is None:
            continue
        for need in dependencies.of(action):
            if dependencies.crosses(need, action):
                slot = max(0, min(index - 1, bisect_left(own_ends, ends[need])))
                receive = Action(action.stage, kind, action.microbatch)
                source = dependencies.ranks[need.stage]
                transfers.append(_Transfer(ends[need], slot, receive, source))
    return transfers


def _in_send_order(transfers: list[_Transfer]) -> list[_Transfer]:
    """Sorted by the time of sending; none in a later slot than one from its source sent later."""
    latest: dict[int, int] = {}
    moved = []
    for transfer in sorted(transfers, reverse=True):
        slot = min(transfer.slot, latest.get(transfer.source, transfer.slot))
        latest[transfer.source] = slot
        moved.append(transfer._replace(slot=slot))
    return moved[::-1]


def _sends(action: Action, dependencies: Dependencies) -> list[Action]:
    kind = _SENT_AFTER.get(action.kind)
    if kind is None:
        return []
    send = Action(action.stage, kind, action.microbatch)
    here, there = action.stage, send.counterpart.stage
    ranks = dependencies.ranks
    return [send] if there in ranks and ranks[here] != ranks[there] else []
