"""One rank of `megapipe bench pipeline`: runs any cell of the table when it is told to.

`python -m megapipe.tools.bench.pipeline_worker SPEC`, where SPEC is JSON: contender ("megapipe" or
"torch"), rank, ranks, store, floats (of an activation), work. An order, one line of JSON, names
schedule, virtual, microbatches, unit (seconds that F, I and W of a stage each take) and begin (the
time, on a clock that all processes of the machine share). The answer holds this rank's compute
actions as text, how long each took within the stage, and when the step began and ended, on the same
clock; or `refused`, why the contender can't.
"""

import json
import sys
from collections.abc import Callable
from time import perf_counter, sleep
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megapipe.distributed.mesh import build_mesh
from megapipe.errors import ScheduleError
from megapipe.layout.axes import Axes
from megapipe.microbatch import MicroBatch
from megapipe.pipeline.executor import PipelineExecutor
from megapipe.pipeline.p2p import Channels, make_channels
from megapipe.pipeline.schedule import Action, build_program, lower, validate
from megapipe.pipeline.schedule.action import stage_ranks
from megapipe.tools.bench.serving import answer, join
from megapipe.tools.bench.timed_stage import PARTS, TimedStage


class Runner(Protocol):
    """A schedule of a contender on this rank: its stages, its compute actions, and a step.

    `parts` are those that an action of it does.
    """

    stages: dict[int, TimedStage]
    actions: list[Action]

    def step(self) -> None: ...

    def parts(self, action: Action) -> str: ...


class MegapipeRunner:
    """The lowered, validated program in the executor, as the engine runs it."""

    def __init__(self, order: dict[str, Any], spec: dict[str, Any], channels: Channels) -> None:
        shape, count = (1, spec["floats"]), order["microbatches"]
        program = build_program(
            order["schedule"],
            pipeline=spec["ranks"],
            virtual=order["virtual"],
            microbatches=count,
        )
        lowered = lower(program)
        validate(lowered)
        ranks = stage_ranks(lowered)
        self.stages = {
            stage: TimedStage(stage, len(ranks), shape, spec["work"])
            for stage, rank in ranks.items()
            if rank == spec["rank"]
        }
        self._executor = PipelineExecutor(
            lowered,
            self.stages,
            channels,
            hidden_shape=shape,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.actions = [action for action in self._executor.program if action.kind.computes]
        self._batches = [MicroBatch(None, None, None, torch.arange(1)) for _ in range(count)]

    def step(self) -> None:
        self._executor.run(self._batches)

    def parts(self, action: Action) -> str:
        return PARTS[action.kind]


def main(spec: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    join(spec, spec["ranks"])
    make = {"megapipe": _megapipe, "torch": _torch}[spec["contender"]](spec)
    runners: dict[tuple[str, int, int], Runner | str] = {}
    answer(ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        key = (order["schedule"], order["virtual"], order["microbatches"])
        if key not in runners:
            try:
                runners[key] = make(order)
            except (ScheduleError, ValueError) as error:  # the latter is torch's
                runners[key] = str(error)
        runner = runners[key]
        if isinstance(runner, str):
            answer(refused=runner)
        else:
            answer(**_step(runner, order["unit"], order["begin"]))


def _megapipe(spec: dict[str, Any]) -> Callable[[dict[str, Any]], Runner]:
    mesh = build_mesh(Axes.of(pipeline=spec["ranks"]), torch.device("cpu"))
    channels = make_channels(mesh)
    return lambda order: MegapipeRunner(order, spec, channels)


def _torch(spec: dict[str, Any]) -> Callable[[dict[str, Any]], Runner]:
    from megapipe.tools.bench.torch_pipeline import TorchRunner  # takes 2 s to import

    return lambda order: TorchRunner(order, spec)


def _step(runner: Runner, unit: float, at: float) -> dict[str, Any]:
    """One step, with `unit` seconds for each part of a stage. All ranks begin `at` one time, since
    the last to leave a barrier may do so half a millisecond late; and none works on its report
    while others are not done."""
    for stage in runner.stages.values():
        stage.start(unit)
    sleep(max(0.0, at - perf_counter()))
    begin = perf_counter()
    runner.step()
    end = perf_counter()
    dist.barrier()
    return {
        "begin": begin,
        "end": end,
        "actions": list(map(str, runner.actions)),
        "took": _took(runner),
    }


def _took(runner: Runner) -> list[float]:
    """Seconds of each action within its stage, from its first part to the end of its last. What was
    done must be what the contender says that its program is, all of it, in that order: it is what
    will be simulated."""
    took, latest = [], 0.0
    for action in runner.actions:
        spans = runner.stages[action.stage].spans
        done = sorted(spans.pop((part, action.microbatch)) for part in runner.parts(action))
        assert not done or done[0][0] >= latest, f"{action} was done before the action before it"
        took.append(done[-1][1] - done[0][0] if done else 0.0)
        latest = done[-1][1] if done else latest
    left = {number: list(stage.spans) for number, stage in runner.stages.items() if stage.spans}
    assert not left, f"done without being in the program: {left}"
    return took


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
