"""Proves, before it runs, that a lowered program finishes and computes everything exactly once.

The executor relies on this meaning of the actions, and the proof takes it at its strictest:

- SEND and RECEIVE block: each waits until the other's rank has come to the other. (The executor
  posts a receive and goes on, and lets some sends be under way. A program that finishes without
  finishes with it.)
- A compute action waits until the tensors that it uses have arrived.
- Between two ranks tensors arrive in the order sent: the first SEND meets the first RECEIVE.
- Stages on one rank hand over without communication, in program order.

**Why a RECEIVE blocks here.** On a GPU a posted receive is a kernel that runs until its tensor has
come, and whatever waits for the whole device waits for it as well: a kernel that is loaded at its
first use, the first collective of a group, memory that the allocator gives back,
CUDA_LAUNCH_BLOCKING=1. If the tensor depends on an action that the host has not enqueued by then,
it never comes. So the rule is: a RECEIVE is posted only after all actions of its rank that its
tensor depends on. An action depends on those whose results it uses, on its other end if it is a
SEND or RECEIVE, on all actions before it on its rank, posted receives included, and on all that
these depend on. In other words, the program finishes if every action blocks.

**Why that is enough.** Whatever waits for a device, at any places and on any number of ranks at
once, makes an action wait for earlier ones of its own rank and for nothing else. The same is true
of streams that share one queue of the hardware, and of kernels that leave no room for others. Here
every action waits for all earlier ones of its rank, and still there is an order in which all of
them complete. With some of these waits taken away, each action still completes, by induction along
that order. (Collectives inside an action add nothing: the tensor ranks of one pipeline rank do the
same actions in the same order, and count as one rank here.)
"""

from collections.abc import Iterator, Set

from megapipe.amounts import counted
from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import COMPUTE, Action, Kind, Program, sequential
from megapipe.pipeline.schedule.dependencies import (
    Numbered,
    completion_order,
    find_blocking_needs,
)
from megapipe.pipeline.schedule.timeline import live_during

Group = tuple[int, Kind]
"""All actions of one kind at a stage."""


def validate(program: Program, *, max_live: float | None = None) -> None:
    """Raises ScheduleError, saying why, unless the program is lowered, complete and deadlock-free.

    Complete: every stage does the forward of every microbatch once and, unless the program has
    forwards only, its backward once (or its input and weight gradient); every tensor between ranks
    is sent and received once. Deadlock-free: also if every SEND and RECEIVE blocks. For a deadlock
    the message is the cycle of waiting ranks.

    `max_live` is the most activations that a rank may ever hold, in chunks of one microbatch as
    `Timeline.peak_live` counts them.
    """
    numbered = Numbered(program)
    _check_neighbours(numbered.ranks, len(program))
    lowered = any(kind not in COMPUTE for _, kind in numbered.at)
    if not lowered and len(set(numbered.ranks.values())) > 1:
        raise ScheduleError("the program has no communication: pass it through `lower` first")
    _check_groups(numbered, communication=True)
    _check_channels(numbered)
    for _ in completion_order(numbered, find_blocking_needs(numbered)):
        pass
    if max_live is not None:
        _check_live(program, max_live)


def _check_neighbours(ranks: dict[int, int], size: int) -> None:
    for stage in range(1, len(ranks)):
        before, here = ranks[stage - 1], ranks[stage]
        if (here - before) % size not in (0, 1, size - 1):
            raise ScheduleError(
                f"stages {stage - 1} and {stage} lie on ranks {before} and {here}, which are not "
                "neighbours on the ring of pipeline ranks: there is no channel between them"
            )


# --- Completeness --------------------------------------------------------------------------------


def check_complete(program: Program) -> None:
    """Raises ScheduleError unless a program without communication has every action once, as
    `validate` does for one with it: a clearer message than that others wait for what is missing."""
    _check_groups(Numbered(sequential(program)), communication=False)


def _check_groups(program: Numbered, *, communication: bool) -> None:
    microbatches = 1 + max((action.microbatch for action in program.actions), default=-1)
    expected = dict(_computation(program, range(microbatches)))
    if communication:
        expected |= dict(_communication(program, range(microbatches)))
    for group, (rank, own) in expected.items():
        _check_group(program, group, rank, own, microbatches)
    for group, numbers in program.at.items():
        _, own = expected.get(group, (0, range(0)))
        if len(numbers) > len(own):
            number = next(number for microbatch, number in numbers.items() if microbatch not in own)
            action = program.actions[number]
            raise ScheduleError(
                f"{action} ({program.place(number)}) is one too many: {_excess(action)}"
            )


def _check_group(
    program: Numbered, group: Group, rank: int, own: range | Set[int], microbatches: int
) -> None:
    """These microbatches are there, and on this rank."""
    numbers = program.at.get(group, {})
    missing = next((microbatch for microbatch in own if microbatch not in numbers), None)
    if missing is not None:
        action = Action(*group, missing)
        raise ScheduleError(
            f"{action} is missing: rank {rank} must do it, as {_purpose(action, microbatches)}"
        )
    for number in numbers.values():
        if program.rank_of[number] != rank:
            action = program.actions[number]
            raise ScheduleError(
                f"{action} ({program.place(number)}) belongs on rank {rank}, which computes stage "
                f"{action.stage}"
            )


Expected = Iterator[tuple[Group, tuple[int, range | Set[int]]]]
"""What must be there: on which rank, and of which microbatches."""


def _computation(program: Numbered, every: range) -> Expected:
    trains = _trains(program)
    for stage, rank in program.ranks.items():
        yield (stage, Kind.FORWARD), (rank, every)
        if trains:
            apart = (stage, Kind.BACKWARD_INPUT), (stage, Kind.BACKWARD_WEIGHT)
            split = {m for group in apart for m in program.at.get(group, ())}
            for group in apart:
                yield group, (rank, split)
            yield (stage, Kind.BACKWARD), (rank, set(every) - split if split else every)


def _communication(program: Numbered, every: range) -> Expected:
    trains = _trains(program)
    for stage, rank in program.ranks.items():
        if program.crosses(stage):
            there = program.ranks[stage + 1]
            yield (stage, Kind.SEND_FORWARD), (rank, every)
            yield (stage + 1, Kind.RECEIVE_FORWARD), (there, every)
            if trains:
                yield (stage + 1, Kind.SEND_BACKWARD), (there, every)
                yield (stage, Kind.RECEIVE_BACKWARD), (rank, every)


def _trains(program: Numbered) -> bool:
    return any(kind in COMPUTE and kind is not Kind.FORWARD for _, kind in program.at)


def _purpose(action: Action, microbatches: int) -> str:
    if action.kind.computes:
        return f"every stage computes {counted(microbatches, 'microbatch')}"
    return f"the tensor goes to another rank ({action.counterpart} is its other end)"


def _excess(action: Action) -> str:
    if action.kind is Kind.BACKWARD:
        return "the stage has the input gradient and the weight gradient of this microbatch apart"
    return "no tensor of this kind goes to or from another rank there"


# --- Order and memory ----------------------------------------------------------------------------


def _check_channels(program: Numbered) -> None:
    """Between each two ranks, receives are posted in the order of the sends."""
    pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}  # by channel: (SEND, RECEIVE)
    for (stage, kind), sends in program.at.items():
        if kind.sends:
            there, receiving, *_ = Action(stage, kind, 0).counterpart
            receives = program.at[there, receiving]
            channel = pairs.setdefault((program.ranks[stage], program.ranks[there]), [])
            channel += [(number, receives[microbatch]) for microbatch, number in sends.items()]
    for (source, rank), channel in pairs.items():
        posted = sorted(receive for _, receive in channel)
        for (send, receive), first in zip(sorted(channel), posted, strict=True):
            if first != receive:
                raise ScheduleError(
                    f"rank {rank} posts {program.actions[first]} where rank {source} sends "
                    f"{program.actions[send]}: receives must be in the order of the sends"
                )


def _check_live(program: Program, max_live: float) -> None:
    for rank, actions in enumerate(program):
        for index, live in enumerate(live_during(actions)):
            if live > max_live:
                raise ScheduleError(
                    f"{actions[index]} (action {index} of rank {rank}) makes {live} activations "
                    f"live on the rank, in chunks of one microbatch; {max_live:g} are allowed"
                )
