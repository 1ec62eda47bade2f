"""Optimizers with all kinds of courses of the learning rate."""

from typing import Any

from hypothesis import strategies as st

from megapipe.optim import OptimizerConfig
from megapipe.optim.rules.adamw import AdamWConfig

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
    return AdamWConfig(**fields), steps


def optimizer(**fields: Any) -> OptimizerConfig:
    return AdamWConfig(**{"learning_rate": 1.0, "min_learning_rate": 0.1, **fields})
