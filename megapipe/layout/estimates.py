"""What a layout takes, from arithmetic alone: FLOPs, times of stages, and memory.

Of communication nothing is counted, nor that small matrices run at a lower rate: a measured plan
knows better.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megapipe.layout.layout import Layout, Stage
from megapipe.layout.parameters import ParameterShard
from megapipe.optim import ParameterGroup, parameter_groups
from megapipe.parameter_role import Role
from megapipe.pipeline.schedule import Costs, Timeline
from megapipe.pipeline.schedule.limit import peak_amounts
from megapipe.precision import BYTES, PRECISIONS


def flops_per_token(layout: Layout) -> float:
    """Model FLOPs of one token, forward and backward, of the whole model."""
    return math.fsum(costs.flops for costs in layout.costs.values())


def stage_costs(layout: Layout) -> Costs:
    """The times of each stage, in units of the forward of one microbatch through 1 / pipeline of
    the model: comparable between schedules, whatever their number of stages."""
    places = [[layout.costs[place] for place in stage.places] for stage in layout.stages]
    forward = [sum(costs.forward for costs in stage) for stage in places]
    unit = sum(forward) / layout.axes.size("pipeline")
    return Costs(
        forward=[work / unit for work in forward],
        backward_input=[sum(costs.backward_input for costs in stage) / unit for stage in places],
        backward_weight=[sum(costs.backward_weight for costs in stage) / unit for stage in places],
    )


def stage_activation_bytes(layout: Layout, stage: Stage) -> int:
    """What one microbatch leaves at a stage from its forward to its backward, on a tensor rank."""
    return sum(layout.costs[place].activation_bytes for place in stage.places)


def peak_bytes(timeline: Timeline, stages: Sequence[int]) -> list[int]:
    """For each rank the most activations it holds at a time; `stages` has the bytes of each."""
    program = [[span.action for span in spans] for spans in timeline.spans]
    return [round(most) for most in peak_amounts(program, stages)]


def parameter_count(layout: Layout) -> int:
    """Parameters of the whole model; a tied one counts once, padding not at all."""
    return sum(spec.size for spec in layout.parameters.values())


def stage_parameter_count(layout: Layout, stage: Stage) -> int:
    """Elements that each tensor rank holds of a stage, padding and copies included."""
    return local_elements(_shards(layout, stage).values())


def local_elements(shards: Iterable[ParameterShard], roles: Collection[Role] = tuple(Role)) -> int:
    """Elements of those shards whose parameters have one of the roles, padding included."""
    return sum(shard.local_size for shard in shards if shard.spec.role in roles)


@dataclass(frozen=True)
class StateBytes:
    """Memory of model states: of one parameter or of many.

    Activations and buffers of communication come on top. States are not yet split over ranks that
    read different samples, so each replica holds all of them.
    """

    weights: int
    gradients: int
    master: int
    optimizer: int

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.master + self.optimizer

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.master + other.master,
            self.optimizer + other.optimizer,
        )

    def __mul__(self, parameters: int) -> "StateBytes":
        return StateBytes(
            self.weights * parameters,
            self.gradients * parameters,
            self.master * parameters,
            self.optimizer * parameters,
        )


def state_bytes(precision: str, group: ParameterGroup) -> StateBytes:
    """Of one parameter of an optimizer's group, with this train.precision."""
    dtypes = PRECISIONS[precision]
    kept = [dtypes.main if one.dtype is None else one.dtype for one in group.state]
    return StateBytes(
        weights=dtypes.model_bytes,
        gradients=dtypes.main_bytes,
        master=dtypes.main_bytes if dtypes.has_master else 0,
        optimizer=sum(BYTES[dtype] for dtype in kept),
    )


def rank_states(layout: Layout) -> list[StateBytes]:
    """What each pipeline rank holds for all of its stages; what two of them share, once."""
    shards: list[dict[str, ParameterShard]] = [{} for _ in range(layout.axes.size("pipeline"))]
    for stage in layout.stages:
        shards[stage.rank] |= _shards(layout, stage)
    held = [StateBytes(0, 0, 0, 0)] * len(shards)
    for group in parameter_groups(layout.config.optimizer):
        each = state_bytes(layout.config.train.precision, group)
        for rank, own in enumerate(shards):
            held[rank] += each * local_elements(own.values(), group.roles)
    return held


def _shards(layout: Layout, stage: Stage) -> Mapping[str, ParameterShard]:
    """What each tensor rank holds of a stage, by the example of the first."""
    place = dict.fromkeys(layout.axes.names, 0) | {"pipeline": stage.rank}
    return layout.shards(stage, layout.axes.rank(place))
