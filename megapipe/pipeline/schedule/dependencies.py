"""What each action of a program waits for, and an order in which all of them can happen.

The passes work on numbers instead of actions, and the reason is speed alone: a program of 128
stages and 1,024 microbatches has nearly a million actions, and looking up a tuple costs several
times as much as indexing a list.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import COMPUTE, Action, Kind, Program, stage_ranks

ByMicrobatch = Mapping[int, int]
"""Of one stage and kind: the number of the action for each microbatch."""

Needs = list[tuple[int, ...]]
"""For each action the numbers of those that must have happened, besides the earlier ones of its
rank."""


_POSTED_TOO_EARLY = (
    "A RECEIVE waits there for its tensor, as it does on a GPU when something waits for the whole "
    "device: post it after all actions of its rank that the tensor depends on."
)


class Numbered:
    """A program whose actions are numbered: rank after rank, in program order.

    `bounds[rank]` is the first number of a rank, and the end of the rank before. Raises
    ScheduleError for an action that is there twice, or a stage that is computed on two ranks.
    """

    def __init__(self, program: Program) -> None:
        self.ranks = stage_ranks(program)
        self.actions = [action for row in program for action in row]
        self.rank_of = [rank for rank, row in enumerate(program) for _ in row]
        self.bounds = list(accumulate(map(len, program), initial=0))
        self.at: dict[tuple[int, Kind], dict[int, int]] = {}
        for number, (stage, kind, microbatch, _) in enumerate(self.actions):
            numbers = self.at.setdefault((stage, kind), {})
            if numbers.setdefault(microbatch, number) != number:
                raise ScheduleError(
                    f"{self.actions[number]} is done twice: as {self.place(numbers[microbatch])} "
                    f"and as {self.place(number)}"
                )

    def place(self, number: int) -> str:
        """For messages."""
        rank = self.rank_of[number]
        return f"action {number - self.bounds[rank]} of rank {rank}"

    def crosses(self, stage: int) -> bool:
        """Whether the next stage is on another rank. False for the last stage."""
        return self.ranks.get(stage + 1, self.ranks[stage]) != self.ranks[stage]


def find_needs(program: Numbered) -> Needs:
    """What has to come from other ranks, for each action.

    In a lowered program a compute action needs the SEND and the RECEIVE of its tensor, if that
    comes from another rank; before lowering, the action that computes it. SEND and RECEIVE complete
    at once. What comes from the same rank only has to stand earlier, which is checked here. Raises
    ScheduleError where it stands later, or nowhere.
    """
    needs: Needs = [()] * len(program.actions)
    rank_of = program.rank_of
    sources = _Sources(program)
    for (stage, kind), numbers in program.at.items():
        for source, numbers_there in sources.of(stage, kind):
            local = source.kind in COMPUTE
            for microbatch, number in numbers.items():
                need = numbers_there.get(microbatch)
                if need is None:
                    raise ScheduleError(
                        f"{program.actions[number]} ({program.place(number)}) needs "
                        f"{source._replace(microbatch=microbatch)}, which no rank does"
                    )
                if rank_of[need] == rank_of[number]:
                    if need > number:
                        raise _later(program, number, need)
                    if local:
                        continue
                needs[number] += (need,)
    return needs


def find_blocking_needs(program: Numbered) -> Needs:
    """The same for a lowered program in which SEND and RECEIVE block: each of the two waits until
    the other's rank has come to the other. Every SEND must have its RECEIVE.

    Since one of a pair has to be the first in an order, a SEND needs the action before its RECEIVE,
    and the RECEIVE needs the SEND.
    """
    needs = find_needs(program)
    for (stage, kind), sends in program.at.items():
        if kind.sends:
            there, receiving, *_ = Action(stage, kind, 0).counterpart
            receives = program.at[there, receiving]
            first = program.bounds[program.ranks[there]]
            for microbatch, send in sends.items():
                receive = receives[microbatch]
                needs[receive] = (send,)
                if receive > first:
                    needs[send] = (receive - 1,)
    return needs


def _later(program: Numbered, number: int, need: int) -> ScheduleError:
    index = need - program.bounds[program.rank_of[need]]
    return ScheduleError(
        f"{program.actions[number]} ({program.place(number)}) needs {program.actions[need]}, which "
        f"comes later on the same rank, as action {index}"
    )


class _Sources:
    """Of which stage and kind an action of a stage and kind needs the same microbatch's."""

    def __init__(self, program: Numbered) -> None:
        self._at, self._program = program.at, program
        self._last_stage = len(program.ranks) - 1
        self._lowered = any(kind not in COMPUTE for _, kind in program.at)

    def of(self, stage: int, kind: Kind) -> list[tuple[Action, ByMicrobatch]]:
        """With an action as an example of each source, for messages."""
        match kind:
            case Kind.FORWARD:
                if stage == 0:
                    return []
                if self._lowered and self._program.crosses(stage - 1):
                    receive = self._find(stage, Kind.RECEIVE_FORWARD)
                    return [receive, self._find(stage - 1, Kind.SEND_FORWARD)]
                return [self._find(stage - 1, Kind.FORWARD)]
            case Kind.BACKWARD | Kind.BACKWARD_INPUT:
                forward = self._find(stage, Kind.FORWARD)
                if stage == self._last_stage:
                    return [forward]
                if self._lowered and self._program.crosses(stage):
                    receive = self._find(stage, Kind.RECEIVE_BACKWARD)
                    return [forward, receive, self._find(stage + 1, Kind.SEND_BACKWARD)]
                return [forward, self._input_gradient(stage + 1)]
            case Kind.BACKWARD_WEIGHT:
                return [self._find(stage, Kind.BACKWARD_INPUT)]
            case Kind.SEND_FORWARD:
                return [self._find(stage, Kind.FORWARD)]
            case Kind.SEND_BACKWARD:
                return [self._input_gradient(stage)]
        return []

    def _find(self, stage: int, kind: Kind) -> tuple[Action, ByMicrobatch]:
        return Action(stage, kind, 0), self._at.get((stage, kind), {})

    def _input_gradient(self, stage: int) -> tuple[Action, ByMicrobatch]:
        """What computes the gradient that the stage before waits for."""
        whole, whole_at = self._find(stage, Kind.BACKWARD)
        apart, apart_at = self._find(stage, Kind.BACKWARD_INPUT)
        return (apart if apart_at else whole), {**whole_at, **apart_at}


def completion_order(program: Numbered, needs: Needs) -> Iterator[int]:
    """All actions, each after those before it on its rank and after all that it needs.

    Whether the program finishes does not depend on how fast ranks are, since nothing that has
    happened can stop an action from happening: one order that gets to the end proves that all do.
    Raises ScheduleError with the cycle of waiting ranks where there is none. Takes time in
    proportion to the number of actions.
    """
    bounds, position = program.bounds, program.bounds[:-1]
    done = bytearray(len(program.actions))
    waiting: dict[int, list[int]] = {}  # for this action, these ranks
    ready = list(range(len(position)))
    while ready:
        rank = ready.pop()
        number, end = position[rank], bounds[rank + 1]
        while number < end:
            needed = needs[number]
            if needed and (missing := [need for need in needed if not done[need]]):
                waiting.setdefault(missing[0], []).append(rank)
                break
            done[number] = True
            yield number
            if number in waiting:
                ready += waiting.pop(number)
            number += 1
        position[rank] = number
    if waiting:
        raise ScheduleError(_explain(program, position, waiting))


def _explain(program: Numbered, position: Sequence[int], waiting: dict[int, list[int]]) -> str:
    """Why nothing moves: from a rank to the one it waits for, until the way meets itself."""
    blocked = {rank: need for need, ranks in waiting.items() for rank in ranks}
    way: list[int] = []
    rank = min(blocked)
    while rank not in way:
        way.append(rank)
        rank = program.rank_of[blocked[rank]]
    cycle = [(position[rank], blocked[rank]) for rank in way[way.index(rank) :]]
    lines = ["the program deadlocks:"]
    for number, need in cycle:
        action, rank = program.actions[number], program.rank_of[number]
        if action.kind.sends:
            need += 1  # the RECEIVE, where `find_blocking_needs` has the action before it
        lines.append(
            f"  rank {rank} waits in {action} (action {number - program.bounds[rank]}) for "
            f"{program.actions[need]} ({program.place(need)})"
        )
    if any(program.actions[number].kind.receives for number, _ in cycle):
        lines.append(_POSTED_TOO_EARLY)
    return "\n".join(lines)
