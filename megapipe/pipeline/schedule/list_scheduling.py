"""Makes a program by simulating ranks that always do the best thing that they can do now."""

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import Action, Kind, Program
from megapipe.pipeline.schedule.simulate import Costs

F, I, W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741

Priority = Callable[[Action], float]
"""What comes first has less: usually the time of the action in an ideal pattern."""


def list_schedule(
    ranks: Sequence[int],
    microbatches: int,
    *,
    priority: Priority,
    limit: float,
    costs: Costs | None = None,
) -> Program:
    """A program with input and weight gradients apart and at most `limit` activations live a rank.

    `ranks` holds the rank of each stage; `limit` counts chunks of one microbatch, from forward to
    weight gradient. Each rank does its forwards in the order of `priority`, and its input gradients
    too. Of the next forward and the next input gradient it takes, among those that can begin, the
    one with less priority; when there is none, the weight gradient that has waited longest; and
    waits when there is none of those either.

    Raises ScheduleError when the limit is too low for these orders.
    """
    return _Simulation(ranks, microbatches, priority, limit, costs or Costs()).run()


class _Rank:
    """What a rank has still to do, and what it holds."""

    def __init__(self, stages: list[int], microbatches: int, priority: Priority) -> None:
        def in_order(kind: Kind) -> deque[tuple[float, Action]]:
            actions = [Action(stage, kind, m) for stage in stages for m in range(microbatches)]
            return deque(sorted((priority(action), action) for action in actions))

        self.todo = {F: in_order(F), I: in_order(I)}
        self.weight_grads: deque[Action] = deque()
        self.live = 0
        self.free_at = 0.0
        self.program: list[Action] = []


class _Simulation:
    def __init__(
        self,
        ranks: Sequence[int],
        microbatches: int,
        priority: Priority,
        limit: float,
        costs: Costs,
    ) -> None:
        self._rank_of, self._limit, self._costs = ranks, limit, costs
        self._last_stage = len(ranks) - 1
        self._ranks = [
            _Rank([s for s, r in enumerate(ranks) if r == rank], microbatches, priority)
            for rank in range(max(ranks) + 1)
        ]
        self._arrives: dict[Action, float] = {Action(0, F, m): 0.0 for m in range(microbatches)}
        """When what an action needs from another stage is there; its forward is another matter."""
        self._wakes = [(0.0, rank) for rank in range(len(self._ranks))]

    def run(self) -> Program:
        while self._wakes:
            now, rank = heappop(self._wakes)
            if self._ranks[rank].free_at <= now:
                action = self._choose(self._ranks[rank], now)
                if action is not None:
                    self._do(rank, action, now)
        if any(rank.todo[I] or rank.todo[F] or rank.weight_grads for rank in self._ranks):
            raise ScheduleError(
                f"no program with these orders of microbatches keeps to {self._limit:g} live chunks"
            )
        return [rank.program for rank in self._ranks]

    def _choose(self, rank: _Rank, now: float) -> Action | None:
        heads = [
            queue[0]
            for kind, queue in rank.todo.items()
            if queue
            and (kind is I or rank.live < self._limit)
            and self._arrives.get(queue[0][1], now + 1) <= now
        ]
        if heads:
            action = min(heads)[1]
            rank.todo[action.kind].popleft()
            return action
        return rank.weight_grads.popleft() if rank.weight_grads else None

    def _do(self, number: int, action: Action, now: float) -> None:
        rank = self._ranks[number]
        rank.program.append(action)
        rank.free_at = now + self._costs.of(action)
        heappush(self._wakes, (rank.free_at, number))
        if action.kind is F:
            rank.live += 1
            # The loss is computed by the last stage: its gradient is there when it is done.
            turns = action.stage == self._last_stage
            consumer = action._replace(kind=I) if turns else action._replace(stage=action.stage + 1)
            self._deliver(action, consumer, rank.free_at)
        elif action.kind is I:
            rank.weight_grads.append(action._replace(kind=W))
            if action.stage > 0:
                self._deliver(action, action._replace(stage=action.stage - 1), rank.free_at)
        else:
            rank.live -= 1

    def _deliver(self, action: Action, consumer: Action, sent: float) -> None:
        destination = self._rank_of[consumer.stage]
        crosses = destination != self._rank_of[action.stage]
        self._arrives[consumer] = sent + (self._costs.latency if crosses else 0.0)
        heappush(self._wakes, (self._arrives[consumer], destination))
