"""What each action of a program waits for, and an order in which all of them can happen."""

from collections.abc import Callable, Iterator

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import Action, Kind, Program, stage_ranks


class Dependencies:
    """`of(action)`: the actions, on any rank, without which this one can't complete.

    A lowered program's dependencies between ranks go through SEND and RECEIVE; without
    communication they go straight from stage to stage. With `rendezvous` a SEND also needs its
    RECEIVE to be posted; without, it completes at once.
    """

    def __init__(self, program: Program, *, rendezvous: bool = False) -> None:
        self.ranks = stage_ranks(program)
        self._rendezvous = rendezvous
        self._last_stage = len(self.ranks) - 1
        self._lowered = any(not action.kind.computes for actions in program for action in actions)
        self._split = {
            (action.stage, action.microbatch)
            for actions in program
            for action in actions
            if action.kind is Kind.BACKWARD_INPUT
        }

    def of(self, action: Action) -> list[Action]:
        stage, kind, microbatch, _ = action
        if kind is Kind.FORWARD:
            if stage == 0:
                return []
            if self._by_message(stage - 1, stage):
                return _both_ends(Action(stage, Kind.RECEIVE_FORWARD, microbatch))
            return [Action(stage - 1, Kind.FORWARD, microbatch)]
        if kind is Kind.BACKWARD or kind is Kind.BACKWARD_INPUT:
            forward = Action(stage, Kind.FORWARD, microbatch)
            if stage == self._last_stage:
                return [forward]
            if self._by_message(stage + 1, stage):
                return [forward, *_both_ends(Action(stage, Kind.RECEIVE_BACKWARD, microbatch))]
            return [forward, self.input_gradient(stage + 1, microbatch)]
        if kind is Kind.BACKWARD_WEIGHT:
            return [Action(stage, Kind.BACKWARD_INPUT, microbatch)]
        if kind.receives:
            return []
        if kind is Kind.SEND_FORWARD:
            producer = Action(stage, Kind.FORWARD, microbatch)
        else:
            producer = self.input_gradient(stage, microbatch)
        return [producer, action.counterpart] if self._rendezvous else [producer]

    def input_gradient(self, stage: int, microbatch: int) -> Action:
        """The action that computes the gradient that the stage before waits for."""
        split = (stage, microbatch) in self._split
        return Action(stage, Kind.BACKWARD_INPUT if split else Kind.BACKWARD, microbatch)

    def crosses(self, producer: Action, consumer: Action) -> bool:
        """Whether the tensor between two compute actions goes from one rank to another."""
        return self.ranks[producer.stage] != self.ranks[consumer.stage]

    def _by_message(self, source: int, destination: int) -> bool:
        return self._lowered and self.ranks[source] != self.ranks[destination]


def _both_ends(receive: Action) -> list[Action]:
    return [receive, receive.counterpart]


Needs = Callable[[Action], list[Action]]


def completion_order(program: Program, needs: Needs) -> Iterator[tuple[int, Action, list[Action]]]:
    """(rank, action, what it needed) of all actions, each after those before it on its rank and
    after all that it needs.

    Whether the program finishes does not depend on how fast ranks are, since nothing that has
    happened can stop an action from happening: one order that gets to the end proves that all do.
    Raises ScheduleError with the cycle of waiting ranks where there is none. Takes time in
    proportion to the number of actions.
    """
    position = [0] * len(program)
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}
    ready = list(range(len(program)))
    while ready:
        rank = ready.pop()
        actions = program[rank]
        while position[rank] < len(actions):
            action = actions[position[rank]]
            needed = needs(action)
            missing = [need for need in needed if need not in done]
            if missing:
                waiting.setdefault(missing[0], []).append(rank)
                break
            done.add(action)
            position[rank] += 1
            yield rank, action, needed
            ready += waiting.pop(action, ())
    if waiting:
        blocked = {rank: need for need, ranks in waiting.items() for rank in ranks}
        raise ScheduleError(_explain(program, position, blocked))


def _explain(program: Program, position: list[int], blocked: dict[int, Action]) -> str:
    """Why nothing moves: from a rank to the one it waits for, until the way meets itself."""
    where = {
        action: (rank, index)
        for rank, actions in enumerate(program)
        for index, action in enumerate(actions)
    }
    way: list[int] = []
    rank = min(blocked)
    while rank not in way:
        way.append(rank)
        action, need = program[rank][position[rank]], blocked[rank]
        here = f"{action} (action {position[rank]} of rank {rank})"
        if need not in where:
            return f"{here} needs {need}, which no rank does"
        rank, index = where[need]
        if rank == way[-1]:
            return f"{here} needs {need}, which comes later on the same rank, as action {index}"
    cycle = way[way.index(rank) :]
    lines = [
        f"  rank {rank} waits in {program[rank][position[rank]]} (action {position[rank]}) for "
        f"{blocked[rank]} (action {where[blocked[rank]][1]} of rank {where[blocked[rank]][0]})"
        for rank in cycle
    ]
    return "the program deadlocks:\n" + "\n".join(lines)
