"""Parts of the equivalence check, and how it ends where a rank can't compare; tests/test_layouts.py
runs it whole."""

import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megapipe.config import Config, load_config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.equivalence.check import (
    Difference,
    Verdict,
    _largest_error,
    check_equivalence,
    relative_error,
)
from megapipe.models.families import FAMILIES
from megapipe.optim import RULES, FlatParameters, ParameterGroup, StepInputs
from tests.equivalence.planting import Plant, Stages, planted
from tests.host_sync import DEVICE
from tests.layouts import layout_of, mesh_of
from tests.ranks import run_ranks

SHAPE = Path(__file__).parents[1] / "configs" / "llama_shape.toml"


def test_values_on_a_device_are_compared_with_the_reference_from_a_file() -> None:
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert _largest_error(torch.tensor([1.0, 2.0, 3.5]).double(), expected) == 0.5
    on_device = torch.empty(3, dtype=torch.float64, device=DEVICE)
    assert _largest_error(on_device, expected).device == DEVICE
    with pytest.raises(RuntimeError, match="device"):  # which is why it is moved
        on_device - expected


def two_stages(*words: str) -> Config:
    layout = ("--parallel.pipeline=2", "--parallel.data=1", "--train.global_batch_size=4")
    return load_config(SHAPE, [*layout, "--train.micro_batch_size=1", *words], FAMILIES)


def check(config: Config, folder: Path | None = None) -> Verdict | None:
    """Of the initial weights, on each rank."""
    tokens = synthetic_tokens(config)
    return check_equivalence(layout_of(config), mesh_of(config), tokens, steps=0, folder=folder)


def spoil_second_stage(stages: Stages) -> None:
    if 1 in stages:
        for parameter in stages[1].parameters():
            parameter.data.fill_(math.nan)


def check_with_nan(config: Config) -> tuple[float, int] | None:
    """The first difference's error and rank, where the second stage starts with weights of NaN."""
    with planted(spoil_second_stage):
        verdict = check(config)
    if verdict is None:
        return None
    first = verdict.first_beyond(1e-9)
    assert first is not None
    return first.error, first.rank


def test_nan_on_another_rank_is_a_difference() -> None:
    first, second = run_ranks(check_with_nan, 2, two_stages())
    assert second is None
    error, rank = first
    assert math.isnan(error)
    assert rank == 1


OVERWRITTEN = (0.0, math.nan)
"""What a rule may leave in the gradients."""


def first_with_rule(config: Config, left: float, plant: Plant) -> Difference | None:
    """The first difference of a step of SGD that leaves `left` in the gradients."""
    sgd = RULES["sgd"]

    def update(config: Any, group: ParameterGroup, flat: FlatParameters, step: StepInputs) -> None:
        sgd.update(config, group, flat, step)
        flat.gradients.fill_(left)

    with pytest.MonkeyPatch.context() as patch, planted(plant):
        patch.setitem(RULES, "sgd", replace(sgd, update=update))
        tokens = synthetic_tokens(config)
        verdict = check_equivalence(layout_of(config), mesh_of(config), tokens, steps=1)
    return verdict.first_beyond(1e-9) if verdict else None


def halve_gradients(stages: Stages) -> None:
    """The losses are right."""
    if 1 in stages:
        stages[1].register_forward_hook(lambda _, inputs, loss: (loss + loss.detach()) / 2)


def nothing(stages: Stages) -> None:
    """No bug."""


@pytest.mark.parametrize("left", OVERWRITTEN)
def test_an_optimizer_may_overwrite_gradients(left: float) -> None:
    """Those that it was given are compared."""
    config = two_stages("--optimizer.name=sgd", "--optimizer.clip_grad_norm=0.01")
    assert run_ranks(first_with_rule, 2, config, left, nothing)[0] is None
    first = run_ranks(first_with_rule, 2, config, left, halve_gradients)[0]
    assert first is not None
    assert first.kind == "gradient"


def check_in(config: Config, folder: Path) -> str:
    try:
        check(config, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "checked"


def test_a_folder_that_rank_0_can_not_use_ends_the_check_on_all(tmp_path: Path) -> None:
    said = run_ranks(check_in, 2, two_stages(), tmp_path / "none")
    assert said[0] == said[1]
    assert said[0].startswith(f"MegapipeError: {tmp_path / 'none'}")


def test_a_loss_of_zero_has_a_relative_error() -> None:
    """That of a model of one token."""
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(2e-15, 0.0) == 2e-15 / 1e-6
    assert relative_error(5.5, 5.0) == pytest.approx(0.1)
    assert math.isnan(relative_error(math.nan, 5.0))
    assert math.isnan(relative_error(5.0, math.nan))


def check_with_small_files(config: Config, folder: Path) -> str:
    """Where the reference is larger than a file may be; the limit of this process is put back."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, limits[1]))
    try:
        return check_in(config, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_reference_that_finds_no_room_ends_the_check_on_all(tmp_path: Path) -> None:
    said = run_ranks(check_with_small_files, 2, two_stages(), tmp_path)
    assert said[0] == said[1]
    assert said[0].startswith(f"MegapipeError: {tmp_path}")
    assert "File too large" in said[0]
