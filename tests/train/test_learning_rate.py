"""The learning rate over a run."""

import math
import tomllib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.config.optimizer import OptimizerConfig
from megapipe.train.learning_rate import Course, course_change, keys_to_keep, learning_rate

rates = st.floats(1e-9, 10.0)


@st.composite
def runs(draw: st.DrawFn, *schedules: str) -> tuple[OptimizerConfig, int]:
    """An optimizer and a number of steps that the config's checks allow together."""
    steps = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, steps))
    peak = draw(rates)
    fields: dict[str, Any] = {
        "learning_rate": peak,
        "min_learning_rate": peak * draw(st.floats(0, 1)),
        "warmup_steps": warmup,
        "schedule": draw(st.sampled_from(schedules)),
    }
    longest = steps - warmup if fields["schedule"] == "wsd" else 2 * steps
    if fields["schedule"] != "constant" and longest > 0 and draw(st.booleans()):
        fields["decay_steps"] = draw(st.integers(1, longest))
    return OptimizerConfig(**fields), steps


def curve(optimizer: OptimizerConfig, steps: int) -> list[float]:
    return [learning_rate(step, optimizer, steps) for step in range(steps)]


def optimizer(**fields: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 1.0, "min_learning_rate": 0.1, **fields})


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


# --- A resume that changes the course ------------------------------------------------------------


def course(steps: int, **fields: Any) -> Course:
    return Course(optimizer(**fields), steps)


@pytest.mark.parametrize(
    ("then", "now", "step", "said"),
    [
        (
            course(20),
            course(40),
            20,
            "config: step 21 gets 5.15e-01 instead of 1.00e-01 (its rate after its last step, 20). "
            "To keep that, set optimizer.decay_steps = 20.",
        ),
        (
            course(20, schedule="linear"),
            course(40, schedule="linear"),
            4,
            "step 5 gets 8.87e-01 instead of ",
        ),
        (course(20), course(20, learning_rate=2.0), 4, "set optimizer.learning_rate = 1.0."),
        (course(20, warmup_steps=2), course(20, warmup_steps=9), 4, "optimizer.warmup_steps = 2"),
        (course(20), course(20, schedule="wsd"), 4, 'set optimizer.schedule = "cosine".'),
        (course(20), course(20, decay_steps=5), 4, "set optimizer.decay_steps = 20."),
        (
            course(20, schedule="wsd"),
            course(40, schedule="wsd"),
            10,
            "config: step 19 gets 1.00e+00 instead of 5.50e-01. To keep that, "
            "set train.steps = 20.",
        ),
        (
            course(20, schedule="wsd"),
            course(40, schedule="wsd"),
            20,
            "set train.steps = 20. Its decay began after step 18: to train longer at the peak, go",
        ),
        (course(20, schedule="constant"), course(20), 4, 'optimizer.schedule = "constant"'),
    ],
)
def test_a_changed_course_is_announced(then: Course, now: Course, step: int, said: str) -> None:
    line = course_change(then, now, step)
    assert line is not None
    assert said in line


def test_a_course_that_stays_is_not_announced() -> None:
    plain = course(20, warmup_steps=3)
    assert course_change(plain, plain, 5) is None
    assert course_change(course(20, decay_steps=30), course(40, decay_steps=30), 20) is None
    assert course_change(plain, course(20, warmup_steps=3, decay_steps=17), 5) is None
    assert course_change(course(20, warmup_steps=9), course(20, warmup_steps=2), 20) is None
    flat = course(20, schedule="constant")
    assert course_change(flat, course(40, schedule="constant"), 20) is None


@pytest.mark.parametrize("step", [0, 50, 99, 100, 101, 5050, 9000])
@pytest.mark.parametrize("kinds", [("linear", "cosine"), ("cosine", "linear")])
def test_a_change_between_two_turns_is_announced(step: int, kinds: tuple[str, str]) -> None:
    """Line and cosine begin and end at the same rates, and cross in the middle."""
    rates = {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 100}
    then, now = (course(10_000, schedule=kind, **rates) for kind in kinds)
    line = course_change(then, now, step)
    assert line is not None
    assert f'set optimizer.schedule = "{kinds[0]}".' in line


@settings(deadline=None, max_examples=60)
@given(
    runs("constant", "linear", "cosine", "wsd"),
    runs("constant", "linear", "cosine", "wsd"),
    st.integers(0, 300),
)
def test_what_is_advised_keeps_the_course(
    old: tuple[OptimizerConfig, int], new: tuple[OptimizerConfig, int], step: int
) -> None:
    then, now = Course(*old), Course(*new)
    values = {key: tomllib.loads(f"x = {v}")["x"] for key, v in keys_to_keep(then, now).items()}
    steps = values.pop("train.steps", now.steps)
    fields = {key.removeprefix("optimizer."): value for key, value in values.items()}
    kept = Course(OptimizerConfig(**(now.optimizer.model_dump() | fields)), steps)
    assert course_change(then, kept, step) is None
    assert [kept.rate(place) for place in range(steps)] == pytest.approx(
        [then.rate(place) for place in range(steps)]
    )
