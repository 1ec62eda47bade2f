"""Costs from arithmetic: they add up to the model's FLOPs, and are comparable between schedules."""

from pathlib import Path

import pytest

from megapipe.config import Config, load_config
from megapipe.layout.program import training_program
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.flops import embedding_flops_per_token, flops_per_token
from megapipe.models.partition import stages
from megapipe.models.stage_costs import Work, equal_costs, stage_costs, stage_work
from megapipe.pipeline.schedule import simulate
from tests.config.examples import write


def load(folder: Path, *words: str) -> Config:
    return load_config(write(folder), ["--parallel.data=1", *words], FAMILIES)


def total(config: Config) -> Work:
    return Work(*map(sum, zip(*(stage_work(config, s) for s in stages(config)), strict=True)))


def test_stages_add_up_to_the_model(tmp_path: Path) -> None:
    config = load(tmp_path)
    model, length = config.model, config.train.sequence_length
    whole = flops_per_token(model, length) + embedding_flops_per_token(model)
    work = total(config)
    assert sum(work) == pytest.approx(whole)
    assert work.backward_weight < work.forward < work.backward_input, "attention has no weights"
    again = total(load(tmp_path, "--train.recompute=full"))
    assert (again.forward, again.backward_weight) == (work.forward, work.backward_weight)
    assert work.forward < again.backward_input - work.backward_input + 6e5 < 2 * work.forward


def test_the_output_layer_counts(tmp_path: Path) -> None:
    config = load(tmp_path, "--parallel.layers_per_stage=[4,4]")
    first, last = (stage_work(config, stage) for stage in stages(config))
    head = 2 * config.model.vocab_size * config.model.hidden_size
    assert last.forward - first.forward == head - 2 * config.model.hidden_size
    assert last.backward_weight - first.backward_weight == last.forward - first.forward


def test_the_unit_does_not_depend_on_the_number_of_stages(tmp_path: Path) -> None:
    """The busy time of a step is that of its work, whatever the schedule."""
    busy = []
    for schedule, virtual in (("1f1b", 1), ("zb-v", 2), ("interleaved-1f1b", 4)):
        words = (f"--parallel.schedule={schedule}", f"--parallel.virtual={virtual}")
        config = load(tmp_path, *words)
        for costs in (stage_costs(config), equal_costs(config, Work(1.0, 1.5, 0.5))):
            spans = simulate(training_program(config), costs).spans
            busy.append(sum(span.duration for row in spans for span in row))
    assert busy[::2] == pytest.approx(busy[:1] * 3)
    assert busy[1::2] == pytest.approx([2 * 8 * 3.0] * 3)
