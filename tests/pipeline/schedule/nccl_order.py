"""Which programs hang on NCCL, by a simulation of nothing but order: no action takes any time.

A rank's host enqueues its actions in program order, onto a stream for compute and one for each
channel (`megapipe.pipeline.p2p`), as torch's ProcessGroupNCCL does:

- A stream carries out what it has been given in order.
- A SEND and a RECEIVE first wait for all compute that was enqueued before them. Then they hold up
  their stream until the other end is there, too. (NCCL may buffer small tensors, whose SENDs then
  wait for less.)
- Compute waits for the arrivals that it uses.
- Before the third SEND under way on a channel, compute waits for the first (`BackendChannel`). If
  the host waited instead, as with other backends, the same would hang: whatever it enqueues
  afterwards waits for compute.

A *sync* waits on a rank's host, before an action or after the last, until the device has done all
that was enqueued. It is what a kernel that is loaded at its first use does, or memory that is given
back to the device.

    python -m tests.pipeline.schedule.nccl_order

goes over more programs than the tests do.
"""

import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from megapipe.pipeline.p2p import UNDER_WAY
from megapipe.pipeline.schedule import (
    SCHEDULES,
    Action,
    Costs,
    Kind,
    Program,
    forward_program,
    lower,
)
from megapipe.pipeline.schedule.action import sequential, stage_ranks
from megapipe.pipeline.schedule.dependencies import Numbered, find_needs
from megapipe.pipeline.schedule.placement import v_shaped
from megapipe.pipeline.schedule.simulate import action_times
from tests.pipeline.programs import Shape

Place = tuple[int, int]
"""A rank, and how many of its actions are enqueued before the sync."""


@dataclass(eq=False)
class Operation:
    """Something on a stream. It begins when `waits_for` operations have ended, and ends when its
    `partner`, the other end of a transfer, has begun."""

    rank: int
    waits_for: int = 0
    followers: list["Operation"] = field(default_factory=list)
    transfers: bool = False
    partner: "Operation | None" = None
    begun: bool = False
    ended: bool = False


class Device:
    """The streams of one rank: the last operation of each, and what has not ended."""

    def __init__(self) -> None:
        self.compute: Operation | None = None
        self.channels: dict[tuple[int, int], Operation] = {}
        self.sending: dict[tuple[int, int], deque[Operation]] = {}
        self.arrivals: dict[Action, Operation] = {}
        self.pending = 0


class Machines:
    """All ranks of a pipeline. A rank in `held` enqueues up to that many actions, and no more."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.held: dict[int, int] = {}
        self.enqueued = [0] * len(program)
        self.devices = [Device() for _ in program]
        self._ranks = stage_ranks(program)
        self._unmatched: dict[tuple[int, int], deque[tuple[Action, Operation]]] = {}

    def run(self) -> None:
        """Enqueue what may be; the devices do what they can at once."""
        for rank, row in enumerate(self.program):
            for action in row[self.enqueued[rank] : self.held.get(rank, len(row))]:
                self._enqueue(rank, action)
                self.enqueued[rank] += 1

    def done(self, rank: int) -> bool:
        """Whether the device has done all that the host has enqueued."""
        return not self.devices[rank].pending

    def finished(self) -> bool:
        ranks = range(len(self.program))
        return all(self.done(r) and self.enqueued[r] == len(self.program[r]) for r in ranks)

    # --- The host --------------------------------------------------------------------------------

    def _enqueue(self, rank: int, action: Action) -> None:
        device = self.devices[rank]
        if action.kind.computes:
            arrival = device.arrivals.get(received_for(action))
            device.compute = self._start(Operation(rank), device.compute, arrival)
            return
        channel = self._channel(action)
        if action.kind.sends:
            under_way = device.sending.setdefault(channel, deque())
            if len(under_way) == UNDER_WAY:
                device.compute = self._start(Operation(rank), device.compute, under_way.popleft())
        transfer = Operation(rank, transfers=True)
        self._match(channel, action, transfer)
        device.channels[channel] = self._start(
            transfer, device.compute, device.channels.get(channel)
        )
        if action.kind.sends:
            under_way.append(transfer)
        else:
            device.arrivals[action] = transfer

    def _channel(self, action: Action) -> tuple[int, int]:
        ends = self._ranks[action.stage], self._ranks[action.counterpart.stage]
        return ends if action.kind.sends else ends[::-1]

    def _match(self, channel: tuple[int, int], action: Action, transfer: Operation) -> None:
        """The k-th SEND of a channel meets its k-th RECEIVE, whatever they are."""
        queue = self._unmatched.setdefault(channel, deque())
        if not queue or queue[0][1].rank == transfer.rank:
            queue.append((action, transfer))
            return
        other, transfer.partner = queue.popleft()
        transfer.partner.partner = transfer
        assert other == action.counterpart, f"{other} meets {action}"

    # --- The device ------------------------------------------------------------------------------

    def _start(self, operation: Operation, *after: Operation | None) -> Operation:
        self.devices[operation.rank].pending += 1
        for before in after:
            if before is not None and not before.ended:
                before.followers.append(operation)
                operation.waits_for += 1
        if not operation.waits_for:
            self._begin(operation)
        return operation

    def _begin(self, operation: Operation) -> None:
        beginning = [operation]
        while beginning:
            operation = beginning.pop()
            operation.begun = True
            if not operation.transfers:
                beginning += self._end(operation)
            elif operation.partner is not None and operation.partner.begun:
                beginning += [*self._end(operation), *self._end(operation.partner)]

    def _end(self, operation: Operation) -> Iterator[Operation]:
        """What can begin now."""
        operation.ended = True
        self.devices[operation.rank].pending -= 1
        for follower in operation.followers:
            follower.waits_for -= 1
            if not follower.waits_for:
                yield follower


# --- Where programs hang -------------------------------------------------------------------------


def lone_hangs(program: Program) -> list[Place]:
    """The places at which one sync, the only one of all ranks, would never return.

    A sync at a place returns if the rank's device gets done with what was enqueued before it while
    the host enqueues nothing more. What has been done stays done, so one walk through a rank's
    program, in which the others go as far as they can at each place, tries all places of the rank.
    """
    hangs = []
    for rank, row in enumerate(program):
        machines = Machines(program)
        for index in range(len(row) + 1):
            machines.held = {rank: index}
            machines.run()
            if not machines.done(rank):
                hangs.append((rank, index))
        assert machines.finished(), "it hangs without any sync"
    return hangs


def finishes(program: Program, syncs: Collection[Place] = ()) -> bool:
    """Whether the program ends with syncs at all of these places."""
    machines = Machines(program)
    pending = [sorted(index for r, index in syncs if r == rank) for rank in range(len(program))]
    moved = True
    while moved:
        machines.held = {rank: places[0] for rank, places in enumerate(pending) if places}
        machines.run()
        moved = False
        for rank, places in enumerate(pending):
            if places and machines.enqueued[rank] == places[0] and machines.done(rank):
                places.pop(0)
                moved = True
    return machines.finished()


def first_uses(program: Program) -> list[Place]:
    """Before the first action of each stage and kind: its kernels are loaded."""
    places = []
    for rank, row in enumerate(program):
        first: dict[tuple[int, Kind], int] = {}
        for index, action in enumerate(row):
            if action.kind.computes:
                first.setdefault((action.stage, action.kind), index)
        places += [(rank, index) for index in first.values()]
    return places


def everywhere(program: Program) -> list[Place]:
    return [(rank, index) for rank, row in enumerate(program) for index in range(len(row) + 1)]


# --- Programs ------------------------------------------------------------------------------------


def shapes(pipelines: Collection[int]) -> Iterator[Shape]:
    """All schedules, with up to three chunks on a rank, and forwards only: for fewer microbatches
    than ranks where that is possible, as many, and more."""
    for name in [*SCHEDULES, "forward", "forward-v"]:
        fewest, most = SCHEDULES[name].chunks if name in SCHEDULES else (1, None)
        for pipeline in pipelines:
            least = SCHEDULES[name].least_microbatches(pipeline) if name in SCHEDULES else 1
            counts = {1, pipeline - 1, pipeline, pipeline + 1, 2 * pipeline + 1}
            for virtual in range(fewest, min(3, most or 3) + 1):
                for microbatches in sorted({max(least, count) for count in counts}):
                    yield Shape(name, pipeline, virtual, microbatches)


def compute(shape: Shape) -> Program:
    """Without communication."""
    if shape.name == "forward-v":
        return forward_program(v_shaped(shape.pipeline, shape.virtual), shape.microbatches)
    return shape.program()


def lower_ahead(program: Program) -> Program:
    """A lowering that hangs: each RECEIVE stands one compute action ahead of its use, or more."""
    numbered = Numbered(sequential(program))
    needs = find_needs(numbered)
    _, ends = action_times(numbered, needs, Costs())
    lowered = []
    for rank, with_receives in enumerate(lower(program)):
        begin, end = numbered.bounds[rank : rank + 2]
        tensors = [(ends[need], number) for number in range(begin, end) for need in needs[number]]
        latest: dict[int, int] = {}
        receives: dict[int, list[Action]] = {}
        for sent, number in sorted(tensors, reverse=True):
            (need,) = needs[number]
            source = numbered.rank_of[need]
            slot = min(number - 1, bisect_left(ends, sent, begin, end), latest.get(source, number))
            latest[source] = max(slot, begin)
            receives.setdefault(latest[source], []).insert(
                0, received_for(numbered.actions[number])
            )
        row, number = [], begin
        for action in with_receives:
            if action.kind.computes:
                row += receives.get(number, [])
                number += 1
            if not action.kind.receives:
                row.append(action)
        lowered.append(row)
    return lowered


def received_for(action: Action) -> Action:
    """The RECEIVE of the tensor that a compute action uses."""
    forward = action.kind is Kind.FORWARD
    kind = Kind.RECEIVE_FORWARD if forward else Kind.RECEIVE_BACKWARD
    return Action(action.stage, kind, action.microbatch)


def main() -> str | None:
    """What hangs; None if nothing does."""
    hanging = []
    for shape in shapes((2, 3, 4, 6, 8)):
        program = lower(compute(shape))
        hangs = lone_hangs(program) or not finishes(program, everywhere(program))
        print(*shape, "HANGS" if hangs else "never hangs", flush=True)
        hanging += [str(shape)] if hangs else []
    return "\n".join(hanging) or None


if __name__ == "__main__":
    sys.exit(main())
