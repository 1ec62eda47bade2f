"""Costs from arithmetic add up to the model's FLOPs."""

from pathlib import Path
from typing import NamedTuple

import pytest

from megapipe.config import load_config
from megapipe.layout.layout import Layout, Stage
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import gpt_model
from megapipe.models.gpt.flops import embedding_flops_per_token, gpt_flops_per_token
from tests.config.examples import write
from tests.layouts import layout_of


class Work(NamedTuple):
    """FLOPs of one token."""

    forward: float
    backward_input: float
    backward_weight: float


def load(folder: Path, *words: str) -> Layout:
    return layout_of(load_config(write(folder), ["--parallel.data=1", *words], FAMILIES))


def work(layout: Layout, *stages: Stage) -> Work:
    costs = [layout.costs[place] for stage in stages for place in stage.places]
    return Work(
        forward=sum(one.forward for one in costs),
        backward_input=sum(one.backward_input for one in costs),
        backward_weight=sum(one.backward_weight for one in costs),
    )


def test_stages_add_up_to_the_model(tmp_path: Path) -> None:
    layout = load(tmp_path)
    model, length = gpt_model(layout.config), layout.config.train.sequence_length
    whole = gpt_flops_per_token(model, length) + embedding_flops_per_token(model)
    total = work(layout, *layout.stages)
    assert sum(total) == pytest.approx(whole)
    assert total.backward_weight < total.forward < total.backward_input, "attention has no weights"
    recomputed = load(tmp_path, "--train.recompute=full")
    again = work(recomputed, *recomputed.stages)
    assert (again.forward, again.backward_weight) == (total.forward, total.backward_weight)
    assert total.forward < again.backward_input - total.backward_input + 6e5 < 2 * total.forward


def test_the_output_layer_counts(tmp_path: Path) -> None:
    layout = load(tmp_path, "--parallel.layers_per_stage=[4,4]")
    first, last = (work(layout, stage) for stage in layout.stages)
    model = layout.config.model
    head = 2 * model.vocab_size * model.hidden_size
    assert last.forward - first.forward == head - 2 * model.hidden_size
    assert last.backward_weight - first.backward_weight == last.forward - first.forward
