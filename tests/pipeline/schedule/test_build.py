"""The generators: published orders, legal for every shape, and errors for what can't be."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Program, build_program, simulate, to_csv
from tests.pipeline.programs import make, parse

SHAPES = [
    (p, v, rounds * p) for p in (1, 2, 3, 4, 8) for v in (1, 2, 3, 4) for rounds in (1, 2, 5)
] + [
    (4, 2, 3),  # fewer microbatches than ranks
    (4, 2, 10),  # groups of 5, larger than the pipeline
    (3, 4, 8),
]


def torch_order(pipeline: int, virtual: int, microbatches: int) -> list[list[str]]:
    """The compute actions of torch's own interleaved 1F1B."""
    torch_schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")
    make_order = torch_schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations
    rounds = max(1, microbatches // pipeline)
    schedule = SimpleNamespace(
        n_local_stages=virtual,
        microbatches_per_round=microbatches // rounds,
        pp_group_size=pipeline,
        _n_microbatches=microbatches,
    )
    rows = [make_order(schedule, rank) for rank in range(pipeline)]
    compute = torch_schedules._ComputationType
    kinds = (compute.FORWARD, compute.FULL_BACKWARD)
    return [[str(a) for a in row if a is not None and a.computation_type in kinds] for row in rows]


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), SHAPES)
def test_interleaved_is_the_order_of_torch(pipeline: int, virtual: int, microbatches: int) -> None:
    program = make("interleaved-1f1b", pipeline, virtual, microbatches)
    assert [[str(a) for a in row] for row in program] == torch_order(
        pipeline, virtual, microbatches
    )


@given(st.integers(1, 8), st.integers(1, 20))
def test_1f1b_is_interleaved_1f1b_without_its_warmup(pipeline: int, microbatches: int) -> None:
    """Interleaving has 2 (p - rank - 1) forwards ahead, 1F1B half of them; it keeps the rest."""
    program = make("1f1b", pipeline, 1, microbatches)
    for rank, row in enumerate(program):
        ahead = min(pipeline - rank - 1, microbatches)
        kinds = "F" * ahead + "FB" * (microbatches - ahead) + "B" * ahead
        assert "".join(action.kind for action in row) == kinds
        for kind in "FB":
            assert [a.microbatch for a in row if a.kind == kind] == list(range(microbatches))


def test_small_programs_as_published() -> None:
    assert make("gpipe", 2, 1, 2) == parse("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
    assert make("1f1b", 2, 1, 3) == parse("0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2")
    assert make("forward", 2, 2, 3) == parse("0F0 0F1 0F2 2F0 2F1 2F2", "1F0 1F1 1F2 3F0 3F1 3F2")


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 30))
def test_interleaved_finishes_for_any_shape(pipeline: int, virtual: int, microbatches: int) -> None:
    """No more than the published bubble where p divides m, and never more than one chunk's 1F1B."""
    program = make("interleaved-1f1b", pipeline, virtual, microbatches)
    timeline = simulate(program)
    assert timeline.bubble <= (pipeline - 1) / microbatches
    if microbatches % pipeline == 0:
        assert timeline.bubble == (pipeline - 1) / (virtual * microbatches)


@pytest.mark.parametrize(
    ("name", "virtual", "microbatches", "message"),
    [
        ("1f2b", 1, 4, 'parallel.schedule = "1f2b" is not a schedule. There are gpipe, 1f1b'),
        ("1f1b", 2, 4, r"one chunk on each rank: set parallel.virtual = 1 \(it is 2\)"),
        ("gpipe", 1, 0, "0 microbatches leave nothing to do: raise train.global_batch_size"),
        ("interleaved-1f1b", 0, 4, "parallel.virtual = 0 must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, virtual: int, microbatches: int, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        build_program(name, pipeline=2, virtual=virtual, microbatches=microbatches)


@given(st.sampled_from(["gpipe", "1f1b", "interleaved-1f1b"]), st.integers(1, 5), st.integers(1, 9))
def test_building_is_a_pure_function(name: str, pipeline: int, microbatches: int) -> None:
    def build() -> Program:
        return make(name, pipeline, 1, microbatches)

    assert to_csv(build()) == to_csv(build())
