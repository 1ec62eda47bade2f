"""How long a program takes: every action at its cost, every tensor at its latency."""

from collections.abc import Sequence
from dataclasses import dataclass

from megapipe.pipeline.schedule.action import Action, Kind, Program, sequential
from megapipe.pipeline.schedule.dependencies import Dependencies, completion_order
from megapipe.pipeline.schedule.timeline import Span, Timeline

PerStage = float | Sequence[float]
"""One number for all stages, or one for each."""


@dataclass(frozen=True)
class Costs:
    """What actions take, in any unit of time.

    A full backward takes `backward_input + backward_weight`. `latency` is the time of a tensor from
    rank to rank, from when it was sent and its receive posted; links are never busy.
    """

    forward: PerStage = 1.0
    backward_input: PerStage = 1.0
    backward_weight: PerStage = 1.0
    latency: float = 0.0

    def of(self, action: Action) -> float:
        match action.kind:
            case Kind.FORWARD:
                return _at(self.forward, action.stage)
            case Kind.BACKWARD_INPUT:
                return _at(self.backward_input, action.stage)
            case Kind.BACKWARD_WEIGHT:
                return _at(self.backward_weight, action.stage)
            case Kind.BACKWARD:
                return _at(self.backward_input, action.stage) + _at(
                    self.backward_weight, action.stage
                )
        return 0.0  # communication takes no time of the rank


def simulate(program: Program, costs: Costs | None = None) -> Timeline:
    """When each action runs if every rank does its actions in order, as early as it can.

    Takes programs before and after `lower`. Raises ScheduleError for one that never finishes.
    """
    costs = costs or Costs()
    program = sequential(program)
    dependencies = Dependencies(program)
    spans: list[list[Span]] = [[] for _ in program]
    free = [0.0] * len(program)
    ends: dict[Action, float] = {}
    for rank, action, needed in completion_order(program, dependencies.of):
        begin = free[rank]
        for need in needed:
            travels = action.kind.computes and (
                not need.kind.computes or dependencies.crosses(need, action)
            )
            begin = max(begin, ends[need] + (costs.latency if travels else 0.0))
        free[rank] = ends[action] = begin + costs.of(action)
        spans[rank].append(Span(action, begin, free[rank]))
    return Timeline(spans)


def _at(cost: PerStage, stage: int) -> float:
    return cost if isinstance(cost, int | float) else cost[stage]
