"""The executor on real ranks: as one process computes, in the order and memory of the program."""

from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.errors import DataError
from megapipe.layout.axes import Axes
from megapipe.pipeline.executor import PipelineExecutor
from megapipe.pipeline.p2p import Channels, make_channels
from megapipe.pipeline.schedule import (
    Action,
    Program,
    assign_buffers,
    forward_program,
    lower,
    simulate,
    validate,
)
from megapipe.pipeline.schedule.action import stage_ranks
from tests.pipeline.programs import (
    make,
    parse,
    random_program,
    shuffle_weight_grads,
    split_backwards,
    v_shaped,
)
from tests.pipeline.toy import (
    HIDDEN,
    Outcome,
    PassOn,
    ToyStage,
    make_batches,
    one_process,
    outcome,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def mesh_of(ranks: int) -> Mesh:
    return build_mesh(Axes.of(pipeline=ranks, data=1, tensor=1), CPU)


def executor_of(
    program: Program, stages: dict[int, ToyStage], channels: Channels
) -> PipelineExecutor:
    return PipelineExecutor(
        program, stages, channels, hidden_shape=HIDDEN, dtype=torch.float64, device=CPU
    )


Stage = TypeVar("Stage", bound=ToyStage)


def own_stages(program: Program, rank: int, kind: type[Stage]) -> dict[int, Stage]:
    ranks = stage_ranks(program)
    return {stage: kind(stage, len(ranks)) for stage in sorted(ranks) if ranks[stage] == rank}


def count_microbatches(program: Program) -> int:
    return 1 + max(action.microbatch for action in program[0])


@dataclass
class Report:
    """One rank's view of two training runs and a forward-only run."""

    first: Outcome
    both: Outcome
    forward_losses: list[float]
    recorded: list[Action]
    times: list[float]
    peak_live: int
    left_live: int
    addresses: set[int]
    buffers: int


class PeakStage(ToyStage):
    """Notes how many activations are live on the whole rank, after each forward."""

    rank_stages: list["PeakStage"]
    peak = 0

    def forward(self, inputs: Tensor | None, batch: object) -> Tensor:
        output = super().forward(inputs, batch)  # type: ignore[arg-type]
        self.peak = max(self.peak, sum(len(stage.live) for stage in self.rank_stages))
        return output


def run_program(program: Program) -> Report:
    """Called on each rank."""
    mesh = mesh_of(len(program))
    rank, microbatches = mesh.pipeline.rank, count_microbatches(program)
    ranks = stage_ranks(program)
    stages = own_stages(program, rank, PeakStage)
    for stage in stages.values():
        stage.rank_stages = list(stages.values())
    channels = make_channels(mesh)
    executor = executor_of(program, dict(stages), channels)
    batches = make_batches(microbatches)

    first = outcome(executor.run(batches), dict(stages))
    recorded = executor.recorded
    both = outcome(executor.run(batches), dict(stages))
    left = sum(len(stage.live) for stage in stages.values())
    peak = max(stage.peak for stage in stages.values())
    addresses = set().union(*(stage.addresses for number, stage in stages.items() if number > 0))
    forwards = lower(forward_program([ranks[stage] for stage in sorted(ranks)], microbatches))
    losses = executor_of(forwards, dict(stages), channels).run(batches)
    assert not any(loss.requires_grad for loss in losses)
    forward_losses = [float(loss) for loss in losses]
    return Report(
        first=first,
        both=both,
        forward_losses=forward_losses,
        recorded=[span.action for span in recorded],
        times=[time for span in recorded for time in span[1:]],
        peak_live=peak,
        left_live=left,
        addresses=addresses,
        buffers=len(set(assign_buffers(program[rank]).values())),
    )


PROGRAMS = {
    "one rank, 3 chunks": make("interleaved-1f1b", 1, 3, 3),
    "gpipe": make("gpipe", 2, 1, 3),
    "1f1b, 3 ranks": make("1f1b", 3, 1, 6),
    "fewer microbatches than ranks": make("1f1b", 3, 1, 2),
    "interleaved": make("interleaved-1f1b", 2, 2, 4),
    "interleaved, not a multiple": make("interleaved-1f1b", 2, 3, 5),
    "v-shaped": v_shaped(3),
    "written by hand": parse(
        "0F0 0F1 0F2 0I0 0F3 0I1 0W0 0I2 0W1 0I3 0W2 0W3",
        "1F0 1I0 1F1 1I1 1W0 1F2 1W1 1I2 1F3 1I3 1W2 1W3",
    ),
    "weight gradients late": split_backwards(make("interleaved-1f1b", 2, 2, 5), delay=2),
    "zb-h1, 3 ranks": make("zb-h1", 3, 1, 5),
    "zb-h2, 3 ranks": make("zb-h2", 3, 1, 6),
    "zb-v": make("zb-v", 2, 2, 5),
    "zb-v, fewer microbatches than its pattern": make("zb-v", 3, 2, 3),
    "v-half": make("v-half", 2, 2, 5),
    "v-min, 3 ranks": make("v-min", 3, 2, 5),
    "dualpipe-v": make("dualpipe-v", 2, 2, 6),
    "zb-h1, weight gradients shuffled": shuffle_weight_grads(make("zb-h1", 3, 1, 5), 1),
    "zb-v, weight gradients shuffled": shuffle_weight_grads(make("zb-v", 2, 2, 5), 2),
    "random": random_program(5, [0, 1, 2, 2, 1, 0], 4, split=True),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_as_one_process(name: str) -> None:
    check_as_one_process(PROGRAMS[name])


def check_as_one_process(program: Program) -> None:
    """Losses, gradients, order and memory of a program on real ranks."""
    lowered = lower(program)
    validate(lowered)
    reports = run_ranks(run_program, len(program), lowered)
    count = len(stage_ranks(program))
    stages = [ToyStage(stage, count) for stage in range(count)]
    expected = one_process(stages, make_batches(count_microbatches(program)))
    assert len(expected.gradients) == 2 * len(stages) + 1

    losses = [report.first.losses for report in reports if report.first.losses]
    assert losses == [pytest.approx(expected.losses, rel=1e-12)], "on the last stage's rank only"
    assert [r.both.losses for r in reports if r.both.losses] == losses
    assert [r.forward_losses for r in reports if r.forward_losses] == losses
    gradients = {k: v for report in reports for k, v in report.first.gradients.items()}
    torch.testing.assert_close(gradients, expected.gradients, rtol=1e-11, atol=1e-11)
    twice = {k: v for report in reports for k, v in report.both.gradients.items()}
    double = {k: 2 * v for k, v in expected.gradients.items()}
    torch.testing.assert_close(twice, double, rtol=1e-11, atol=1e-11)

    timeline = simulate(lowered)
    for rank, report in enumerate(reports):
        assert report.recorded == lowered[rank], "the plan is the program"
        assert report.times == sorted(report.times)
        assert report.peak_live == timeline.peak_live[rank]
        assert report.left_live == 0, "activations are freed at once"


@pytest.mark.parametrize("name", ["1f1b, 3 ranks", "interleaved", "weight gradients late"])
def test_receive_buffers_are_reused(name: str) -> None:
    lowered = lower(PROGRAMS[name])
    for report in run_ranks(run_program, len(lowered), lowered):
        assert len(report.addresses) <= report.buffers


class Loopback(Channels):
    """Channels of rank 1 in one process: notes what is sent and into what is received."""

    def __init__(self) -> None:
        super().__init__(1, {})
        self.sent: list[Tensor] = []
        self.buffers: list[Tensor] = []

    def __getitem__(self, pair: tuple[int, int]) -> Any:
        return self

    def send(self, tensor: Tensor, tag: int) -> None:
        self.sent.append(tensor)

    def receive(self, buffer: Tensor, tag: int) -> "Loopback":
        self.buffers.append(buffer)
        return self

    def wait(self) -> None:
        for buffer in self.buffers:
            buffer.normal_()


def test_a_stage_may_pass_on_what_came() -> None:
    """Its output and its gradient would else lie in buffers that are received into again."""
    channels = Loopback()
    executor = executor_of(lower(make("1f1b", 3, 1, 4)), {1: PassOn(1, 3)}, channels)
    executor.run(make_batches(4))
    assert len(channels.sent) == len(channels.buffers) == 8
    received = {buffer.untyped_storage().data_ptr() for buffer in channels.buffers}
    assert not received & {sent.untyped_storage().data_ptr() for sent in channels.sent}


def run_failing(program: Program, error: Exception) -> None:
    mesh = mesh_of(len(program))
    stages = own_stages(program, mesh.pipeline.rank, ToyStage)
    if mesh.pipeline.rank == 1:
        stages[1].fails_at = error
    executor = executor_of(program, stages, make_channels(mesh))
    try:
        executor.run(make_batches(8))
    except Exception:
        if mesh.pipeline.rank == 1:
            raise
    else:
        dist.barrier()  # wait for the other's error


@pytest.mark.parametrize("error", [DataError("no such token"), RuntimeError("out of memory")])
def test_an_error_keeps_its_type_and_says_where(error: Exception) -> None:
    program = lower(make("1f1b", 2, 1, 8))
    with pytest.raises(type(error), match=str(error)) as caught:
        run_ranks(run_failing, 2, program, error)
    index = program[1].index(Action.parse("1F2"))
    before = " ".join(map(str, program[1][index - 6 : index]))
    after = " ".join(map(str, program[1][index + 1 : index + 7]))
    assert caught.value.__notes__[0] == (
        f"pipeline rank 1, in 1F2, action {index} of {len(program[1])}:\n"
        f"  ... {before} >>> 1F2 <<< {after} ..."
    )


def test_a_run_after_a_failed_one_starts_afresh() -> None:
    program = make("interleaved-1f1b", 1, 2, 4)
    stages = own_stages(program, 0, ToyStage)
    executor = executor_of(program, stages, make_channels(Mesh.single(CPU)))
    batches = make_batches(4)
    stages[1].fails_at = DataError("no such token")
    with pytest.raises(DataError):
        executor.run(batches)
    stages[1].fails_at = None
    assert len(executor.run(batches)) == 4
    assert [span.action for span in executor.recorded] == program[0]


def test_wrong_stages_or_number_of_batches_are_programmer_errors() -> None:
    program = make("gpipe", 1, 1, 2)
    channels = make_channels(Mesh.single(CPU))
    with pytest.raises(AssertionError):
        executor_of(program, {1: ToyStage(1, 2)}, channels)
    executor = executor_of(program, {0: ToyStage(0, 1)}, channels)
    with pytest.raises(AssertionError):
        executor.run(make_batches(3))
