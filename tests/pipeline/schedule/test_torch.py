"""Against torch.distributed.pipelining: same orders, its text, its simulator, its runtime.

Torch's schedules are built as their users build them, on stages that are only names: no process
group and no tensors, but in the one test that runs our programs in its runtime.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megapipe.pipeline.schedule import (
    SCHEDULES,
    Action,
    Kind,
    Program,
    compute_only,
    from_csv,
    lower,
    simulate,
    to_csv,
)
from megapipe.pipeline.schedule.action import overlap, sequential, stage_ranks
from tests.pipeline.programs import Shape, random_programs, shapes
from tests.ranks import run_ranks

torch_schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")
PipelineStage: Any = pytest.importorskip("torch.distributed.pipelining").PipelineStage

SINGLE = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}
MULTI = {
    "interleaved-1f1b": "ScheduleInterleaved1F1B",
    "zb-h1": "ScheduleInterleavedZeroBubble",  # with one stage on a rank
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}


def torch_runtime(class_name: str, pipeline: int, virtual: int, microbatches: int) -> Any:
    """One of torch's schedules of several stages, or its bare runtime."""
    stages = [
        SimpleNamespace(
            num_stages=pipeline * virtual,
            group_size=pipeline,
            group_rank=0,
            submod=None,
            is_last=False,
        )
        for _ in range(virtual)
    ]
    return getattr(torch_schedules, class_name)(stages, microbatches)


def torch_order(name: str, pipeline: int, virtual: int, microbatches: int) -> Program:
    if name in MULTI:
        order = torch_runtime(MULTI[name], pipeline, virtual, microbatches).pipeline_order
    else:
        schedule = SimpleNamespace(_num_stages=pipeline, _n_microbatches=microbatches)
        order = getattr(torch_schedules, SINGLE[name])._get_pipeline_order(schedule)
    rows = [[str(a) for a in order[rank] if a is not None] for rank in range(pipeline)]
    program = from_csv("".join(",".join(row) + "\n" for row in rows))
    return [*program[:-1], from_zero(program[-1])] if name == "1f1b" else program


def from_zero(row: list[Action]) -> list[Action]:
    """Torch 2.13 writes the last rank's forwards of 1F1B down as 1, 2, ..., m."""
    first = next(a.microbatch for a in row if a.kind is Kind.FORWARD)
    return [
        a._replace(microbatch=a.microbatch - first) if a.kind is Kind.FORWARD else a for a in row
    ]


SHAPES = [
    Shape("interleaved-1f1b", p, v, rounds * p)
    for p in (1, 2, 3, 4, 8)
    for v in (2, 3, 4)
    for rounds in (1, 2, 5)
]
SHAPES += [
    Shape("interleaved-1f1b", 4, 2, 3),  # fewer microbatches than ranks
    Shape("interleaved-1f1b", 4, 2, 10),  # groups of 5, larger than the pipeline
    Shape("interleaved-1f1b", 3, 4, 8),
]
SHAPES += [
    Shape(name, p, SCHEDULES[name].chunks[0], m)
    for name in ("gpipe", "1f1b", "zb-h1", "zb-v", "dualpipe-v")
    for p in (1, 2, 3, 4, 5, 8)
    for m in (1, 2, 3, p, 2 * p - 1, 2 * p, 3 * p + 1, 5 * p)
    if m >= SCHEDULES[name].least_microbatches(p)
    and (name != "1f1b" or m >= p)  # torch's has forwards of microbatches that are not there
]


@pytest.mark.parametrize("name", [*SINGLE, *MULTI])
def test_the_order_is_that_of_torch(name: str) -> None:
    chosen = [shape for shape in SHAPES if shape.name == name and torch_can(shape)]
    assert len(chosen) >= 20
    for shape in chosen:
        assert shape.program() == torch_order(*shape), shape


def torch_can(shape: Shape) -> bool:
    """Torch's zb-h1 needs whole rounds of p microbatches, or of equal groups of more."""
    rounds = max(1, shape.microbatches // shape.pipeline)
    return shape.name != "zb-h1" or shape.microbatches % rounds == 0


# --- Text ----------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.sampled_from(Kind), st.integers(0, 999))
def test_torch_reads_every_action(stage: int, kind: Kind, microbatch: int) -> None:
    action = Action(stage, kind, microbatch)
    if kind is Kind.OVERLAP:
        forward = action._replace(kind=Kind.FORWARD)
        action = overlap(forward, Action(stage + 1, Kind.BACKWARD, microbatch + 1))
    theirs = torch_schedules._Action.from_str(str(action))
    assert str(theirs) == str(action)
    assert theirs.is_compute_op == kind.computes


@pytest.mark.parametrize("name", MULTI)
def test_we_load_what_torch_exports(name: str, tmp_path: Path) -> None:
    shape = Shape(name, 4, SCHEDULES[name].chunks[0], 12)
    schedule = torch_runtime(MULTI[name], *shape[1:])
    file = tmp_path / "torch.csv"
    schedule._dump_csv(str(file), format="compute_only")
    assert from_csv(file.read_text()) == shape.program()
    schedule._dump_csv(str(file), format="compute_comms")
    text = file.read_text()
    assert all(word in text for word in ("UNSHARD", "RESHARD", "REDUCE_GRAD", "SEND_F", "RECV_B"))
    with_communication = from_csv(text)
    assert compute_only(with_communication) == shape.program()
    kinds = {a.kind for row in with_communication for a in row}
    assert {Kind.SEND_FORWARD, Kind.RECEIVE_BACKWARD} <= kinds


def load_into_torch(program: Program, file: Path, form: str) -> Any:
    """Torch's runtime with our program; raises where torch's validation refuses it."""
    ranks = stage_ranks(program)
    microbatches = 1 + max(a.microbatch for row in sequential(program) for a in row)
    virtual = len(ranks) // len(program)
    runtime = torch_runtime("_PipelineScheduleRuntime", len(program), virtual, microbatches)
    file.write_text(to_csv(program))
    runtime._load_csv(str(file), format=form)
    assert runtime.stage_index_to_group_rank == ranks
    return runtime


def test_torch_loads_simulates_and_gives_back_our_programs(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("torch") / "ours.csv"

    @settings(max_examples=30)
    @given(shapes())
    def check(shape: Shape) -> None:
        program = shape.program()
        runtime = load_into_torch(program, file, "compute_only")
        order = runtime.pipeline_order
        assert [[str(a) for a in order[rank]] for rank in order] == [
            [str(a) for a in row] for row in program
        ]
        # Its simulator knows no pairs, and lets a receive wait for its send.
        runtime = load_into_torch(sequential(program), file, "compute_only")
        steps = {k: without_sharding(row) for k, row in runtime.pipeline_order_with_comms.items()}
        placed = runtime.stage_index_to_group_rank
        done = torch_schedules._simulate_comms_compute(steps, placed.__getitem__, len(placed))
        ours = sequential(program)
        for rank, row in done.items():
            computed = [str(a) for a in row if a is not None and a.is_compute_op]
            assert computed == [str(a) for a in ours[rank]]

    check()


def without_sharding(row: list[Any]) -> list[Any]:
    kinds = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
    return [action for action in row if action.computation_type.value not in kinds]


def test_torchs_runtime_takes_our_communication(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ours is not for its simulator, in which a receive that is posted ahead would block."""
    file = tmp_path_factory.mktemp("torch") / "ours.csv"

    @settings(max_examples=50)
    @given(shapes().map(Shape.program) | random_programs())
    def check(program: Program) -> None:
        lowered = lower(program)
        runtime = load_into_torch(lowered, file, "compute_comms")
        order = runtime.pipeline_order_with_comms
        assert [[str(a) for a in order[rank]] for rank in order] == [
            [str(a) for a in row] for row in lowered
        ]

    check()


def run_in_torch(csv: Path, ranks: list[int], microbatches: int) -> dict[str, torch.Tensor]:
    """Gradients of this rank's stages. Called on each rank."""
    rank = dist.get_rank()
    stages = [
        PipelineStage(layer(stage), stage, len(ranks), torch.device("cpu"))
        for stage, place in enumerate(ranks)
        if place == rank
    ]
    runtime = torch_schedules._PipelineScheduleRuntime(
        stages, microbatches, loss_fn=square_error, scale_grads=False
    )
    runtime._load_csv(str(csv), format="compute_comms")
    inputs, targets = batch(microbatches)
    first, last = ranks[0] == rank, ranks[-1] == rank
    runtime.step(*[inputs] * first, **{"target": targets} if last else {})
    return {
        f"{stage.stage_index}.{name}": parameter.grad
        for stage in stages
        for name, parameter in stage.submod.named_parameters()
    }


def layer(stage: int) -> nn.Module:
    torch.manual_seed(stage)
    return nn.Linear(4, 4, dtype=torch.float64)


def batch(microbatches: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    shape = (2 * microbatches, 4)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(2)]


def square_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum()


OLD = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="torch before 2.13 greets a neighbouring stage on the same rank, which gloo refuses",
)


@pytest.mark.parametrize(
    "name",
    ["1f1b", "zb-h1", pytest.param("zb-v", marks=OLD), pytest.param("dualpipe-v", marks=OLD)],
)
def test_torchs_runtime_runs_our_communication(name: str, tmp_path: Path) -> None:
    """Our sends and receives, on its channels, give the gradients of one process."""
    shape = Shape(name, 2, SCHEDULES[name].chunks[0], 5)
    file = tmp_path / "ours.csv"
    file.write_text(to_csv(lower(shape.program())))
    ranks = SCHEDULES[name].placement(shape.pipeline, shape.virtual)
    reports = run_ranks(run_in_torch, shape.pipeline, file, ranks, shape.microbatches)
    gradients = {key: value for report in reports for key, value in report.items()}

    whole = nn.Sequential(*map(layer, range(len(ranks))))
    inputs, targets = batch(shape.microbatches)
    square_error(whole(inputs), targets).backward()
    expected = {key: parameter.grad for key, parameter in whole.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-11)


def test_what_torch_lowers_takes_as_long_in_our_simulation() -> None:
    for name, class_name in MULTI.items():
        shape = Shape(name, 4, SCHEDULES[name].chunks[0], 8)
        rows = torch_runtime(class_name, *shape[1:]).pipeline_order_with_comms
        text = "".join(",".join(map(str, rows[rank])) + "\n" for rank in rows)
        theirs = simulate(sequential(from_csv(text))).makespan
        # In torch a pair's first result waits for its second; ours leaves at once.
        late = 3 if name == "dualpipe-v" else 0
        assert theirs == simulate(shape.program()).makespan + late
