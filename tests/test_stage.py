"""Stages from a layout: what they compute with, and what they have to be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from torch import Tensor, nn

from megapipe import kernel_choice
from megapipe.config import load_config
from megapipe.layout.layout import Layout
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.family import GPTFamily
from tests.config.examples import write
from tests.layouts import engine_of, layout_of, stages_of
from tests.ranks import run_ranks

FOUR_STAGES = ("--parallel.tensor=1", "--parallel.virtual=2", "--parallel.schedule=zb-v")
ONE_STAGE = ("--parallel.tensor=1", "--parallel.pipeline=1")


def load(folder: Path, *words: str) -> Layout:
    always = ("--parallel.data=1", "--train.precision=fp32", "--train.device=cpu")
    return layout_of(load_config(write(folder), [*always, *words], FAMILIES))


def choices(layout: Layout) -> int:
    """How often kernels are chosen while an engine with two stages on each rank is built."""
    wanted = Mock(wraps=kernel_choice.wanted_kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_choice, "wanted_kernels", wanted)
        engine = engine_of(layout.config)
    assert len(engine.stages) == 2
    return wanted.call_count


def test_kernels_are_chosen_once_for_all_stages(tmp_path: Path) -> None:
    assert run_ranks(choices, 2, load(tmp_path, *FOUR_STAGES)) == [1, 1]


class Family(GPTFamily):
    """Stages as `change` makes them."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change

    def build_stage(self, build: Any) -> Any:
        return self.change(super().build_stage(build))


class Wrapped(nn.Module):
    """A stage that hides what it has."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *given: Any) -> Tensor:
        output: Tensor = self.stage(*given)
        return output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Wrapped, "Wrapped has to keep the store of its StageBuild as `weight_grads`"),
        (lambda stage: stage.forward, "a stage is a module of torch's"),
    ],
    ids=["no weight_grads", "no module"],
)
def test_a_stage_that_the_executor_can_not_use_is_refused(
    tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    layout = load(tmp_path, *ONE_STAGE)
    stages_of(layout)
    with pytest.raises(AssertionError, match=said):
        stages_of(replace(layout, family=Family(change)))
