"""Adds communication to a program: a SEND after each action whose result another rank needs, and
its RECEIVE on that rank, early enough that no SEND ever has to wait for it."""

from bisect import bisect_left

from megapipe.pipeline.schedule.action import COMPUTE, Action, Kind, Program, sequential
from megapipe.pipeline.schedule.dependencies import Needs, Numbered, find_needs
from megapipe.pipeline.schedule.simulate import Costs, action_times

_RECEIVED_FOR = {
    Kind.FORWARD: Kind.RECEIVE_FORWARD,
    Kind.BACKWARD: Kind.RECEIVE_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.RECEIVE_BACKWARD,
}


def lower(program: Program) -> Program:
    """The program with SEND and RECEIVE actions; stages on one rank need none between them.

    A SEND stands behind the action that computes its tensor. A RECEIVE stands one compute action
    before the one that uses it, or earlier: before the action that is running when, in the
    simulated timeline, the tensor is sent. There every SEND finds its RECEIVE posted. Since the
    timeline is one order in which everything completes even if each SEND blocks, the result has no
    deadlock however fast the ranks really are (`completion_order` says why). When they are not as
    fast as simulated a RECEIVE may be posted late, but one action ahead is still in time while no
    transfer takes longer than that action; earlier, it would hold a buffer for longer.

    Between two ranks receives are in the order of sends, as communicators without tags need.
    Raises ScheduleError for a program that can't finish even with unlimited buffers.
    """
    assert all(action.kind in COMPUTE for actions in program for action in actions), (
        "the program was lowered before"
    )
    numbered = Numbered(sequential(program))
    needs = find_needs(numbered)
    _, ends = action_times(numbered, needs, Costs())
    return [_lower_rank(rank, numbered, needs, ends) for rank in range(len(program))]


def _lower_rank(rank: int, program: Numbered, needs: Needs, ends: list[float]) -> list[Action]:
    begin, end = program.bounds[rank : rank + 2]
    receives = _receives(begin, end, program, needs, ends)
    sends = _sends(rank, program)
    lowered: list[Action] = []
    for action, posted_before in zip(program.actions[begin:end], receives, strict=True):
        lowered += reversed(posted_before)
        lowered.append(action)
        if send := sends.get((action.stage, action.kind)):
            lowered.append(Action(action.stage, send, action.microbatch))
    return lowered


def _receives(
    begin: int, end: int, program: Numbered, needs: Needs, ends: list[float]
) -> list[list[Action]]:
    """For each action of a rank the receives that are posted before it, the last one first."""
    own_ends = ends[begin:end]
    transfers = []
    for number in range(begin, end):
        for need in needs[number]:
            stage, kind, microbatch, _ = program.actions[number]
            receive = Action(stage, _RECEIVED_FOR[kind], microbatch)
            slot = max(0, min(number - begin - 1, bisect_left(own_ends, ends[need])))
            transfers.append((ends[need], slot, receive, program.rank_of[need]))
    # In the order of sending; none in a later slot than one from its source that is sent later.
    receives: list[list[Action]] = [[] for _ in own_ends]
    latest: dict[int, int] = {}
    for _, slot, receive, source in sorted(transfers, reverse=True):
        latest[source] = min(slot, latest.get(source, slot))
        receives[latest[source]].append(receive)
    return receives


def _sends(rank: int, program: Numbered) -> dict[tuple[int, Kind], Kind]:
    """After actions of which stage and kind the rank sends, and with which kind of SEND."""
    sends: dict[tuple[int, Kind], Kind] = {}
    for stage, kind in program.at:
        if program.ranks[stage] != rank:
            continue
        if kind is Kind.FORWARD and program.crosses(stage):
            sends[stage, kind] = Kind.SEND_FORWARD
        if kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and stage and program.crosses(stage - 1):
            sends[stage, kind] = Kind.SEND_BACKWARD
    return sends
