"""What a layout takes: FLOPs, times of stages, activations and model states."""

from pathlib import Path

import pytest

from megapipe.config import load_config
from megapipe.layout.estimates import (
    StateBytes,
    flops_per_token,
    local_elements,
    parameter_count,
    peak_bytes,
    rank_states,
    stage_activation_bytes,
    stage_costs,
    stage_parameter_count,
    state_bytes,
)
from megapipe.layout.layout import Layout
from megapipe.models.families import FAMILIES
from megapipe.optim import ParameterGroup, StateTensor, parameter_groups
from megapipe.parameter_role import Role
from megapipe.pipeline.schedule import Costs, build_program, from_csv, simulate
from tests.config.examples import write
from tests.layouts import layout_of

INTERLEAVED = ("--parallel.schedule=interleaved-1f1b", "--parallel.virtual=2")
MATRICES = 8 * (64 * 64 * 2 + 64 * 32 * 2 + 2 * 64 * 256)
"""Of the layers of the example config: query and output, key and value, up and down."""
VOCABULARY = 500 * 64
NORMS = (2 * 8 + 1) * 64


def layout(folder: Path, *words: str) -> Layout:
    """8 layers of width 64 with 8 heads (4 of keys and values) and 500 tokens, on 2 tensor and 2
    pipeline ranks."""
    plain = ("--model.activation=gelu", "--model.norm=rmsnorm", "--model.ffn_hidden_size=256")
    return layout_of(load_config(write(folder), [*plain, *words], FAMILIES))


# --- Work ----------------------------------------------------------------------------------------


def test_flops_of_a_token_by_hand(tmp_path: Path) -> None:
    """6 for each weight of a product, 12 for each of the keys that a query meets."""
    found = layout(tmp_path)
    attention = 12 * 8 * 64 * (64 / 2)
    assert flops_per_token(found) == 6 * (MATRICES + VOCABULARY) + attention
    assert flops_per_token(layout(tmp_path, "--train.recompute=full")) == flops_per_token(found)
    assert flops_per_token(layout(tmp_path, "--parallel.pipeline=4")) == flops_per_token(found)


def test_the_unit_of_costs_is_a_rank_s_share_of_the_forward(tmp_path: Path) -> None:
    for words in ((), INTERLEAVED, ("--parallel.pipeline=4",)):
        found = layout(tmp_path, *words)
        costs = stage_costs(found)
        assert isinstance(costs.forward, list)
        assert sum(costs.forward) == pytest.approx(found.axes.size("pipeline"))
        assert len(costs.forward) == len(found.stages)


def test_the_busy_time_of_a_step_does_not_depend_on_the_schedule(tmp_path: Path) -> None:
    busy = []
    for schedule, virtual in (("1f1b", 1), ("zb-v", 2), ("interleaved-1f1b", 4)):
        words = (f"--parallel.schedule={schedule}", f"--parallel.virtual={virtual}")
        found = layout(tmp_path, *words)
        equal = Costs(*(part / virtual for part in (1.0, 1.5, 0.5)))
        for costs in (stage_costs(found), equal):
            spans = simulate(found.program.compute, costs).spans
            busy.append(sum(span.duration for row in spans for span in row))
    assert busy[::2] == pytest.approx(busy[:1] * 3)
    assert busy[1::2] == pytest.approx([2 * 8 * 3.0] * 3)


def test_recompute_adds_a_forward_of_the_layers_to_the_input_gradient(tmp_path: Path) -> None:
    plain, again = (
        layout(tmp_path, f"--train.recompute={kind}", "--parallel.layers_per_stage=[4,4]")
        for kind in ("none", "full")
    )
    one, other = stage_costs(plain), stage_costs(again)
    assert one.forward == other.forward
    assert one.backward_weight == other.backward_weight
    layers = 4 * plain.costs[0].forward
    unit = sum(costs.forward for costs in plain.costs.values()) / 2
    for before, after in zip(one.backward_input, other.backward_input, strict=True):  # type: ignore[arg-type]
        assert after - before == pytest.approx(layers / unit)


# --- Activations ---------------------------------------------------------------------------------


def test_a_stage_has_the_activations_of_its_places(tmp_path: Path) -> None:
    found = layout(tmp_path, "--parallel.layers_per_stage=[3,5]")
    first, last = (stage_activation_bytes(found, stage) for stage in found.stages)
    layer, head = found.costs[0].activation_bytes, found.costs["last"].activation_bytes
    assert (first, last) == (3 * layer, 5 * layer + head)
    full = layout(tmp_path, "--train.recompute=full", "--parallel.layers_per_stage=[3,5]")
    assert stage_activation_bytes(full, full.stages[0]) == 3 * full.boundary_bytes


def test_peaks() -> None:
    timeline = simulate(from_csv("0F0,0F1,1F0,1I0,1F1,1W0,0I0,1B1,0B1,0W0\n"))
    assert peak_bytes(timeline, [10, 3]) == [26]
    assert timeline.peak_pending == [1]
    for name, virtual in (("1f1b", 1), ("zb-h2", 1), ("zb-v", 2), ("dualpipe-v", 2)):
        program = build_program(name, pipeline=4, virtual=virtual, microbatches=9)
        timeline = simulate(program)
        assert peak_bytes(timeline, [1] * 4 * virtual) == timeline.peak_live


# --- Parameters and states -----------------------------------------------------------------------


def test_parameters_by_hand(tmp_path: Path) -> None:
    found = layout(tmp_path)
    assert parameter_count(found) == MATRICES + 2 * VOCABULARY + NORMS
    tied = layout(tmp_path, "--model.tie_embeddings=true")
    assert parameter_count(tied) == MATRICES + VOCABULARY + NORMS


def test_parameters_of_a_tensor_rank_have_padding_and_copies(tmp_path: Path) -> None:
    found = layout(tmp_path, "--parallel.layers_per_stage=[4,4]")
    first, last = found.stages
    matrices, padded = MATRICES // 2 // 2, 256 * 64
    assert stage_parameter_count(found, first) == matrices + padded + 8 * 64
    assert stage_parameter_count(found, last) == matrices + padded + 9 * 64
    at_first, at_last = (
        found.shards(
            stage, found.axes.rank({"pipeline": stage.rank, "data": 0, "tensor": 0})
        ).values()
        for stage in (first, last)
    )
    assert local_elements(at_first, [Role.MATRIX]) == matrices
    assert local_elements(at_first, [Role.EMBEDDING, Role.OUTPUT]) == padded
    assert local_elements(at_last, [Role.EMBEDDING]) == 0
    assert local_elements(at_last, []) == 0
    wide = layout(tmp_path, "--parallel.tensor=8", "--parallel.layers_per_stage=[4,4]")
    heads = 8 * 64  # one of the 4 heads of keys, which is on two ranks
    layer = (2 * 64 * 64 + 2 * 64 * 256) // 8 + 2 * heads
    at_first = wide.shards(wide.stages[0], rank=0).values()
    assert local_elements(at_first, [Role.MATRIX]) == 4 * layer


@pytest.mark.parametrize(("precision", "each"), [("bf16", 18), ("fp32", 16), ("fp64", 32)])
def test_states_follow_precision(tmp_path: Path, precision: str, each: int) -> None:
    found = layout(tmp_path, f"--train.precision={precision}")
    for group in parameter_groups(found.config.optimizer):
        assert state_bytes(precision, group).total == each
    counts = [stage_parameter_count(found, stage) for stage in found.stages]
    assert [states.total for states in rank_states(found)] == [each * count for count in counts]


def test_state_of_a_group_in_a_dtype_of_its_own() -> None:
    kept = (StateTensor("sum", "bfloat16"), StateTensor("mean"))
    group = ParameterGroup((Role.MATRIX,), 0.0, kept)
    assert state_bytes("bf16", group) == StateBytes(2, 4, 4, 2 + 4)
    assert state_bytes("fp64", group) == StateBytes(8, 8, 0, 2 + 8)


def test_states_add_up() -> None:
    one = StateBytes(2, 4, 4, 8)
    assert one * 3 == StateBytes(6, 12, 12, 24) == one + one + one
    assert (one * 3).total == 54


def test_interleaved_stages_add_up_on_their_rank(tmp_path: Path) -> None:
    words = (*INTERLEAVED, "--train.precision=fp32", "--parallel.layers_per_stage=[1,2,3,2]")
    found = layout(tmp_path, *words)
    held = [states.total for states in rank_states(found)]
    counts = [stage_parameter_count(found, stage) for stage in found.stages]
    assert held == [16 * (counts[0] + counts[2]), 16 * (counts[1] + counts[3])]
    plain = layout(tmp_path, "--train.precision=fp32")
    assert sum(held) == sum(states.total for states in rank_states(plain))


@pytest.mark.parametrize("schedule", ["zb-v", "v-min", "v-half", "dualpipe-v"])
def test_a_tied_embedding_with_both_ends_on_a_rank_is_held_once(
    tmp_path: Path, schedule: str
) -> None:
    words = (f"--parallel.schedule={schedule}", "--parallel.virtual=2", "--train.precision=fp32")
    found = layout(tmp_path, *words, "--model.tie_embeddings=true")
    assert found.placement[0] == found.placement[-1] == 0
    first, *between, last = (stage_parameter_count(found, stage) for stage in found.stages)
    held = [states.total for states in rank_states(found)]
    assert held == [16 * (first + last - 256 * 64), 16 * sum(between)]
