"""Which weights hold at which step, as the config declares it."""

from typing import Any

import pytest

from megapipe.config.data import DataConfig, PhaseConfig, SourceConfig
from megapipe.data.order.timeline import Phase, phase_at, phases_of
from megapipe.errors import ConfigError


def configured(*phases: PhaseConfig, **weights: float) -> DataConfig:
    sources = tuple(
        SourceConfig(name=name, path=name, weight=weight) for name, weight in weights.items()
    )
    return DataConfig(tokenizer="t", sources=sources, phases=phases)


def phase(weights: dict[str, float], **start: Any) -> PhaseConfig:
    return PhaseConfig(weights=weights, **start)


def test_weights_of_the_sources_begin_the_run() -> None:
    """They sum to one, in the order of names; a source of weight 0 rests."""
    (only,) = phases_of(configured(b=1.0, a=3.0, later=0.0), 100)
    assert only == Phase(0, {"a": 0.75, "b": 0.25})
    assert list(only.weights) == ["a", "b"]


def test_phases_are_in_the_order_of_their_steps_however_they_are_written() -> None:
    config = configured(
        phase({"b": 2.0}, after_step=50), phase({"a": 1.0, "b": 1.0}, after_tokens=1001), a=1.0, b=0
    )
    assert phases_of(config, 100) == (
        Phase(0, {"a": 1.0}),
        Phase(11, {"a": 0.5, "b": 0.5}),
        Phase(50, {"b": 1.0}),
    )


@pytest.mark.parametrize(("tokens", "step"), [(1, 1), (100, 1), (101, 2), (1000, 10)])
def test_tokens_are_brought_by_whole_steps(tokens: int, step: int) -> None:
    config = configured(phase({"a": 1.0}, after_tokens=tokens), a=1.0)
    assert phases_of(config, 100)[1].after_step == step


def test_the_phase_of_a_step() -> None:
    phases = phases_of(configured(phase({"a": 1.0}, after_step=5), a=1.0, b=1.0), 100)
    assert [phase_at(phases, step).after_step for step in (0, 4, 5, 6, 999)] == [0, 0, 5, 5, 5]


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([phase({"a": 1.0}, after_step=0)], "behind step 0, as the weights of data.sources does"),
        (
            [phase({"a": 1.0}, after_step=7), phase({"a": 1.0}, after_tokens=650)],
            "behind step 7, as another phase does; give it a later step",
        ),
    ],
)
def test_two_phases_that_begin_together_are_refused(phases: list[PhaseConfig], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        phases_of(configured(*phases, a=1.0), 100)
