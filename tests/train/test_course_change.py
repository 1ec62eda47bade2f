"""What is said of a resume that changes the learning rates, and what keeps them."""

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.optim import OptimizerConfig
from megapipe.optim.learning_rate import Course
from megapipe.optim.rules.adamw import AdamWConfig
from megapipe.train.course_change import course_change, keys_to_keep
from tests.optim.samples import optimizer, runs


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
    kept = Course(AdamWConfig(**(now.optimizer.model_dump() | fields)), steps)
    assert course_change(then, kept, step) is None
    assert [kept.rate(place) for place in range(steps)] == pytest.approx(
        [then.rate(place) for place in range(steps)]
    )
