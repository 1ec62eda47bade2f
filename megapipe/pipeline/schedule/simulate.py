"""How long a program takes: every action at its cost, every tensor at its latency."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megapipe.pipeline.schedule.action import Action, Kind, Program, sequential
from megapipe.pipeline.schedule.dependencies import Needs, Numbered, completion_order, find_needs
from megapipe.pipeline.schedule.timeline import Span, Timeline

PerStage = float | Sequence[float]
"""One number for all stages, or one for each."""


@dataclass(frozen=True)
class Costs:
    """What actions take, in any unit of time.

    A full backward takes `backward_input + backward_weight`. `latency` is the time of a tensor from
    rank to rank, from when it was sent and its receive posted: all have one size, so what they take
    by a link's bandwidth is part of it. Links are never busy: an action sends one tensor at
    most, and the next one takes longer than that tensor travels.
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
    numbered = Numbered(sequential(program))
    begins, ends = action_times(numbered, find_needs(numbered), costs or Costs())
    spans = list(map(Span, numbered.actions, begins, ends))
    return Timeline([spans[begin:end] for begin, end in pairwise(numbered.bounds)])


def action_times(program: Numbered, needs: Needs, costs: Costs) -> tuple[list[float], list[float]]:
    """(begins, ends) of all actions, by number."""
    durations = [0.0] * len(program.actions)
    for (stage, kind), numbers in program.at.items():
        duration = costs.of(Action(stage, kind, 0))
        for number in numbers.values():
            durations[number] = duration
    rank_of, latency = program.rank_of, costs.latency
    begins, ends = [0.0] * len(durations), [0.0] * len(durations)
    free = [0.0] * (len(program.bounds) - 1)
    for number in completion_order(program, needs):
        begin = free[rank_of[number]]
        for need in needs[number]:  # tensors from other ranks: all of them travel
            if (arrives := ends[need] + latency) > begin:
                begin = arrives
        begins[number] = begin
        free[rank_of[number]] = ends[number] = begin + durations[number]
    return begins, ends


def _at(cost: PerStage, stage: int) -> float:
    return cost if isinstance(cost, int | float) else cost[stage]
