"""The check of a config on this machine: what it says, and the exit status."""

import pytest
import torch

from megapipe.config import Config, load_config
from megapipe.equivalence.run import verify
from megapipe.equivalence.shrink import shrink
from megapipe.models.families import FAMILIES
from tests.equivalence.planting import Stages, planted
from tests.test_layouts import CONFIGS


def two_stages() -> Config:
    words = ("--parallel.pipeline=2", "--parallel.data=1")
    return load_config(CONFIGS / "llama_shape.toml", words, FAMILIES)


def run(config: Config) -> int:
    return verify(config, FAMILIES[config.model.family], "my.toml", steps=1)


def test_it_says_what_was_changed(capfd: pytest.CaptureFixture[str]) -> None:
    config = two_stages()
    family = FAMILIES[config.model.family]
    small, changes = shrink(config, family)
    assert run(config) == 0
    out = capfd.readouterr().out
    assert "the layout of my.toml against one process" in out.splitlines()[0]
    assert changes
    assert "".join(f"  {change}\n" for change in changes) in out
    assert "PASSED: the layout equals one process over one step" in out
    assert shrink(small, family) == (small, [])
    assert run(small) == 0
    assert "Changed" not in capfd.readouterr().out


def fail(stages: Stages) -> None:
    if 1 in stages:
        raise ZeroDivisionError("by zero")


def test_a_rank_that_fails_is_named_with_its_coordinates(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with planted(fail):
        assert run(two_stages()) == 1
    said = capfd.readouterr().err
    assert said.startswith("rank 1 (pipeline 1, data 0, tensor 0) failed:\nTraceback")


def double_a_norm(stages: Stages) -> None:
    if 1 in stages:
        with torch.no_grad():
            next(p for p in stages[1].parameters() if p.ndim == 1).mul_(2)


def test_a_wrong_layout_fails(capfd: pytest.CaptureFixture[str]) -> None:
    """The ranks are forked, and have the bug too."""
    with planted(double_a_norm):
        assert run(two_stages()) == 1
    out = capfd.readouterr().out
    assert "FAILED in step 1: initial weight layers." in out
    assert "on rank 1 (pipeline 1, data 0, tensor 0), stage 1" in out
