"""Every configuration of every kernel compiles for each target and is fit to run there."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from megapipe.kernels.compilation import TARGETS
from megapipe.tools.compile_kernels import kernel_modules

pytestmark = pytest.mark.timeout(900)  # the first of these tests compiles for all of them


@cache
def rows() -> tuple[dict[str, Any], ...]:
    """Compiled in a process of its own: in this one, Triton may be set to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "megapipe.tools.compile_kernels"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    return tuple(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", kernel_modules())
def test_fit(module: str, target: str) -> None:
    own = [row for row in rows() if (row["module"], row["target"]) == (module, target)]
    assert own
    unfit = [row for row in own if row["problems"]]
    assert not unfit, unfit
