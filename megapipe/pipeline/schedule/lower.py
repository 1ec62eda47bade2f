"""Adds communication to a program: a SEND after each action whose result another rank needs, and
its RECEIVE on that rank, at the moment at which the tensor is sent."""

from bisect import bisect_left

from megapipe.pipeline.schedule.action import COMPUTE, Action, Kind, Program, sequential
from megapipe.pipeline.schedule.dependencies import Needs, Numbered, find_needs
from megapipe.pipeline.schedule.simulate import Costs, action_times

_RECEIVED_FOR = {
    Kind.FORWARD: Kind.RECEIVE_FORWARD,
    Kind.BACKWARD: Kind.RECEIVE_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.RECEIVE_BACKWARD,
}
_LATENCY = 2.0**-20
"""Of a tensor, in forwards: too little for a million of them to change the order of two actions
that do not end at the same moment, and exact in a float."""


def lower(program: Program) -> Program:
    """The program with SEND and RECEIVE actions; stages on one rank need none between them.

    A SEND stands behind the action that computes its tensor. A RECEIVE stands where its rank is
    when the tensor is sent, in a simulated timeline: behind the actions that have ended by then,
    and before the one that is running. So:

    - All compute actions in the order in which they end, each followed by the transfer of its
      result, are one order that every rank keeps to. A program in which every SEND and RECEIVE
      blocks can be carried out in that order, and `validate` proves it. Between two ranks receives
      are in the order of sends.
    - In the timeline, no SEND has to wait for its RECEIVE, and a tensor that is not needed at once
      travels while its receiver computes.

    The timeline is that of equal stages. A rank that is slower than its neighbours may post a
    RECEIVE late: behind an action during which the tensor could have travelled. That costs the rank
    what the transfer takes, at most; to post earlier could hang (`validate` says why). Tensors take
    a moment in the timeline, so that actions which would otherwise end at the same time have an
    order: a rank that waited for more tensors is later.

    Raises ScheduleError for a program that can't finish even with unlimited buffers.
    """
    assert all(action.kind in COMPUTE for actions in program for action in actions), (
        "the program was lowered before"
    )
    numbered = Numbered(sequential(program))
    needs = find_needs(numbered)
    _, ends = action_times(numbered, needs, Costs(latency=_LATENCY))
    places = [0] * len(ends)
    for place, number in enumerate(sorted(range(len(ends)), key=ends.__getitem__)):
        places[number] = place
    return [_lower_rank(rank, numbered, needs, places) for rank in range(len(program))]


def _lower_rank(rank: int, program: Numbered, needs: Needs, places: list[int]) -> list[Action]:
    """`places` says where each action is in the order of their ends."""
    begin, end = program.bounds[rank : rank + 2]
    receives = _receives(begin, end, program, needs, places)
    sends = _sends(rank, program)
    lowered: list[Action] = []
    for action, posted_before in zip(program.actions[begin:end], receives, strict=True):
        lowered += posted_before
        lowered.append(action)
        if send := sends.get((action.stage, action.kind)):
            lowered.append(Action(action.stage, send, action.microbatch))
    return lowered


def _receives(
    begin: int, end: int, program: Numbered, needs: Needs, places: list[int]
) -> list[list[Action]]:
    """For each action of a rank the receives that are posted before it, in order."""
    own = places[begin:end]
    receives: list[list[Action]] = [[] for _ in own]
    tensors = [(places[need], number) for number in range(begin, end) for need in needs[number]]
    for sent, number in sorted(tensors):
        stage, kind, microbatch, _ = program.actions[number]
        receive = Action(stage, _RECEIVED_FOR[kind], microbatch)
        receives[bisect_left(own, sent)].append(receive)
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
