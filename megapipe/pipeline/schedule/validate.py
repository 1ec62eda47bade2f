"""Proves, before it runs, that a lowered program finishes and computes everything exactly once.

The executor relies on this meaning of the actions, and the proof takes it at its strictest:

- RECEIVE posts a receive into a free buffer and never waits.
- SEND waits until its RECEIVE was posted: there is no buffering. (The executor lets a few sends be
  under way; a program that finishes without any finishes with some.)
- A compute action waits until the tensors that it uses have arrived.
- Between two ranks tensors arrive in the order sent: the first SEND meets the first RECEIVE.
- Stages on one rank hand over without communication, in program order.
"""

from collections.abc import Iterator

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import Action, Kind, Program, stage_ranks
from megapipe.pipeline.schedule.dependencies import Dependencies, completion_order

Positions = dict[Action, tuple[int, int]]
"""Where each action stands: rank, and index on the rank."""


def validate(program: Program) -> None:
    """Raises ScheduleError, saying why, unless the program is lowered, complete and deadlock-free.

    Complete: every stage does the forward of every microbatch once and, unless the program has
    forwards only, its backward once (or its input and weight gradient); every tensor between ranks
    is sent and received once. For a deadlock the message is the cycle of waiting ranks.
    """
    ranks = stage_ranks(program)
    _check_neighbours(ranks, len(program))
    positions = _positions(program)
    _check_complete(program, positions, ranks)
    _check_channels(program, ranks)
    for _ in completion_order(program, Dependencies(program, rendezvous=True).of):
        pass


def _check_neighbours(ranks: dict[int, int], size: int) -> None:
    for stage in range(1, len(ranks)):
        before, here = ranks[stage - 1], ranks[stage]
        if (here - before) % size not in (0, 1, size - 1):
            raise ScheduleError(
                f"stages {stage - 1} and {stage} lie on ranks {before} and {here}, which are not "
                "neighbours on the ring of pipeline ranks: there is no channel between them"
            )


def _positions(program: Program) -> Positions:
    positions: Positions = {}
    for rank, actions in enumerate(program):
        for index, action in enumerate(actions):
            if action in positions:
                first, first_index = positions[action]
                raise ScheduleError(
                    f"{action} is done twice: as action {first_index} of rank {first} and as "
                    f"action {index} of rank {rank}"
                )
            positions[action] = (rank, index)
    return positions


def _check_complete(program: Program, positions: Positions, ranks: dict[int, int]) -> None:
    microbatches = 1 + max((action.microbatch for action in positions), default=-1)
    lowered = len(set(ranks.values())) <= 1 or any(not a.kind.computes for a in positions)
    if not lowered:
        raise ScheduleError("the program has no communication: pass it through `lower` first")
    expected = 0
    for action, rank in _expected(positions, ranks, microbatches):
        if action not in positions:
            raise ScheduleError(
                f"{action} is missing: rank {rank} must do it, as {_purpose(action, microbatches)}"
            )
        if positions[action][0] != rank:
            here, index = positions[action]
            raise ScheduleError(
                f"{action} (action {index} of rank {here}) belongs on rank {rank}, which computes "
                f"stage {action.stage}"
            )
        expected += 1
    if expected < len(positions):
        needed = {action for action, _ in _expected(positions, ranks, microbatches)}
        action, (rank, index) = next(item for item in positions.items() if item[0] not in needed)
        raise ScheduleError(
            f"{action} (action {index} of rank {rank}) is one too many: {_excess(action)}"
        )


def _expected(
    positions: Positions, ranks: dict[int, int], microbatches: int
) -> Iterator[tuple[Action, int]]:
    """Every action that the program must have, with the rank that must do it: computation first."""
    trains = any(a.kind.computes and a.kind is not Kind.FORWARD for a in positions)
    apart = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
    for stage, rank in ranks.items():
        for microbatch in range(microbatches):
            yield Action(stage, Kind.FORWARD, microbatch), rank
            if trains:
                split = any(Action(stage, kind, microbatch) in positions for kind in apart)
                for kind in apart if split else (Kind.BACKWARD,):
                    yield Action(stage, kind, microbatch), rank
    for stage, rank in ranks.items():
        there = ranks.get(stage + 1, rank)
        if there == rank:
            continue
        for microbatch in range(microbatches):
            sends = [(Action(stage, Kind.SEND_FORWARD, microbatch), rank, there)]
            if trains:
                sends.append((Action(stage + 1, Kind.SEND_BACKWARD, microbatch), there, rank))
            for send, source, destination in sends:
                yield send, source
                yield send.counterpart, destination


def _purpose(action: Action, microbatches: int) -> str:
    if action.kind.computes:
        return f"every stage computes each of {microbatches} microbatches"
    return f"the tensor goes to another rank ({action.counterpart} is its other end)"


def _excess(action: Action) -> str:
    if action.kind is Kind.BACKWARD:
        return "the stage has the input gradient and the weight gradient of this microbatch apart"
    return "no tensor of this kind goes to or from another rank there"


def _check_channels(program: Program, ranks: dict[int, int]) -> None:
    """Between each two ranks, receives are posted in the order of the sends."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for rank, actions in enumerate(program):
        for action in actions:
            if action.kind.sends:
                receive = action.counterpart
                sent.setdefault((rank, ranks[receive.stage]), []).append(receive)
            elif action.kind.receives:
                source = ranks[action.counterpart.stage]
                received.setdefault((source, rank), []).append(action)
    for (source, rank), receives in received.items():
        for first_sent, first_posted in zip(sent[source, rank], receives, strict=True):
            if first_sent != first_posted:
                raise ScheduleError(
                    f"rank {rank} posts {first_posted} where rank {source} sends "
                    f"{first_sent.counterpart}: receives must be in the order of the sends"
                )
