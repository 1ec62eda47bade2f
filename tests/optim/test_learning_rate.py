"""The learning rate over a run."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings

from megapipe.optim import OptimizerConfig
from megapipe.optim.learning_rate import learning_rate
from tests.optim.samples import optimizer, runs


def curve(optimizer: OptimizerConfig, steps: int) -> list[float]:
    return [learning_rate(step, optimizer, steps) for step in range(steps)]


@settings(deadline=None)
@given(runs("constant", "linear", "cosine", "wsd"))
def test_rises_linearly_then_never_rises(run: tuple[OptimizerConfig, int]) -> None:
    given, steps = run
    rate, peak, warmup = curve(given, steps), given.learning_rate, given.warmup_steps
    assert max(rate) <= peak
    assert min(rate[warmup:], default=peak) >= min(given.min_learning_rate, peak)
    assert rate[:warmup] == pytest.approx([peak * n / warmup for n in range(1, warmup + 1)])
    assert all(value > 0 for value in rate[:warmup])
    assert warmup == 0 or rate[warmup - 1] == peak
    after = rate[max(0, warmup - 1) :]
    assert all(later <= earlier for earlier, later in pairwise(after))


@settings(deadline=None)
@given(runs("linear", "cosine", "wsd"))
def test_ends_at_the_minimum(run: tuple[OptimizerConfig, int]) -> None:
    given, steps = run
    last = learning_rate(steps - 1, given, steps)
    if given.warmup_steps == steps:
        assert last == given.learning_rate
    elif given.decay_steps is None or given.schedule == "wsd":
        assert last == given.min_learning_rate
    elif given.warmup_steps + given.decay_steps <= steps:
        assert learning_rate(given.warmup_steps + given.decay_steps - 1, given, steps) == last
        assert last == given.min_learning_rate


@settings(deadline=None)
@given(runs("linear", "cosine", "wsd"))
def test_no_jump(run: tuple[OptimizerConfig, int]) -> None:
    """No step changes the rate by more than the steepest part of its curve does."""
    given, steps = run
    rate, warmup = curve(given, steps), given.warmup_steps
    length = max(1, steps - warmup)
    if given.schedule == "wsd":
        length = min(length, math.ceil(steps / 10))
    length = given.decay_steps or length
    steepest = (given.learning_rate - given.min_learning_rate) / length
    steepest *= math.pi / 2 if given.schedule == "cosine" else 1  # in the middle
    for earlier, later in pairwise(rate[max(0, warmup - 1) :]):
        assert earlier - later <= steepest * (1 + 1e-6) + 4e-16 * given.learning_rate


def test_constant() -> None:
    given = optimizer(schedule="constant", warmup_steps=4)
    assert curve(given, 7) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_linear() -> None:
    given = optimizer(schedule="linear", warmup_steps=2)
    assert curve(given, 5) == pytest.approx([0.5, 1.0, 0.7, 0.4, 0.1])


def test_cosine_is_halfway_in_the_middle() -> None:
    given = optimizer(schedule="cosine", warmup_steps=2)
    rate = curve(given, 10)
    assert rate[5] == pytest.approx(0.55)
    assert rate[3] - rate[4] > rate[1] - rate[2], "it begins gently"


def test_wsd_decays_over_the_last_tenth() -> None:
    rate = curve(optimizer(schedule="wsd", warmup_steps=10), 100)
    assert rate[9:90] == [1.0] * 81
    assert rate[90:] == pytest.approx([1 - 0.09 * n for n in range(1, 11)])
    rate = curve(optimizer(schedule="wsd", decay_steps=3), 8)
    assert rate == pytest.approx([1, 1, 1, 1, 1, 0.7, 0.4, 0.1])


def test_decay_steps_end_the_decay_early() -> None:
    rate = curve(optimizer(schedule="linear", warmup_steps=1, decay_steps=3), 7)
    assert rate == pytest.approx([1, 0.7, 0.4, 0.1, 0.1, 0.1, 0.1])
