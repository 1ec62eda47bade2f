"""`megapipe verify` as a command; tests/equivalence/ tests what it does."""

from pathlib import Path

import pytest

from megapipe.tools.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


def test_a_right_layout_passes(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.data=1", "--steps", "2"]
    assert main(["verify", str(CONFIGS / "gpt2_shape.toml"), *words]) == 0
    out = capfd.readouterr().out
    assert "PASSED: the layout equals one process over 2 steps, to 1e-09." in out
    assert "train.global_batch_size" in out, "what was reduced is said"
    assert "gradient norms" in out
