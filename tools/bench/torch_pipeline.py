"""torch.distributed.pipelining as a contender of `megapipe bench pipeline`."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules

from megapipe.pipeline.schedule import SCHEDULES, Action, Kind, build_program
from megapipe.tools.bench.timed_stage import PARTS, TimedStage

THEIRS = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved-1f1b": "ScheduleInterleaved1F1B",
    "zb-h1": "ScheduleInterleavedZeroBubble",  # with one stage on a rank it is the same order
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}
"""torch's class for the schedules that it has."""


SENDS_TO_ITSELF = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""Its first step greets neighbouring stages, those on the same rank too, which gloo refuses."""


class TorchRunner:
    """One of their schedules on this rank. Shapes are given, so that nothing is inferred."""

    def __init__(self, order: dict[str, Any], spec: dict[str, Any]) -> None:
        """Raises ValueError for a schedule or number of microbatches that torch can't have."""
        if order["schedule"] not in THEIRS:
            raise ValueError(f"torch has no {order['schedule']}")
        rank, ranks, count = spec["rank"], spec["ranks"], order["microbatches"]
        shape = (1, spec["floats"])
        placement = SCHEDULES[order["schedule"]].placement(ranks, order["virtual"])
        if SENDS_TO_ITSELF and any(one == other for one, other in pairwise(placement)):
            raise ValueError(f"torch {torch.__version__} can't have two neighbours on one rank")
        self.stages = {
            stage: TimedStage(stage, len(placement), shape, spec["work"])
            for stage, holder in enumerate(placement)
            if holder == rank
        }
        example = torch.zeros(shape)
        stages = [
            PipelineStage(
                stage,
                number,
                len(placement),
                torch.device("cpu"),
                input_args=example if number == 0 else example.clone().requires_grad_(),
                output_args=example.clone().requires_grad_(),
            )
            for number, stage in self.stages.items()
        ]
        kind = getattr(schedules, THEIRS[order["schedule"]])
        single = issubclass(kind, schedules.PipelineScheduleSingle)
        self._schedule = kind(
            stages[0] if single else stages, count, loss_fn=_loss, scale_grads=False
        )
        self.actions = _order(self._schedule, order, spec)
        self._inputs = (torch.zeros(count, spec["floats"]),) if 0 in self.stages else ()
        self._target = torch.zeros(count, 1) if len(placement) - 1 in self.stages else None

    def step(self) -> None:
        """`return_outputs=False` spares it keeping and joining the outputs, which nobody reads."""
        self._schedule.step(*self._inputs, target=self._target, return_outputs=False)

    def parts(self, action: Action) -> str:
        """Their I of stage 0 does nothing, since no gradient leaves it: its W does both."""
        if action.stage == 0 and action.kind is Kind.BACKWARD_INPUT:
            return ""
        if action.stage == 0 and action.kind is Kind.BACKWARD_WEIGHT:
            return "IW"
        return PARTS[action.kind]


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return output.sum()


def _order(schedule: Any, order: dict[str, Any], spec: dict[str, Any]) -> list[Action]:
    """What this rank computes, in order. Schedules of one stage on a rank are loops of theirs, in
    our order (what they say themselves of 1F1B numbers the forwards of later ranks wrongly)."""
    if isinstance(schedule, schedules.PipelineScheduleSingle):
        program = build_program(
            order["schedule"],
            pipeline=spec["ranks"],
            virtual=1,
            microbatches=order["microbatches"],
        )
        return program[spec["rank"]]
    return [
        Action.parse(str(part))
        for action in schedule.pipeline_order[spec["rank"]]
        if action is not None
        for part in action.sub_actions or (action,)
    ]
