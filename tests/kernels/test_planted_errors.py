"""The proofs of the kernels fail where they must: errors planted one at a time in scratch copies.

The errors are data: planted_rows.py, planted_attention.py and planted_sums.py. Each is one that a
developer could make, with the kernel's own test that has to refuse it.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megapipe import kernels
from tests.interpreter import compiling_environment
from tests.kernels.compile_kernels import kernel_modules
from tests.kernels.planted import Planted, copies
from tests.kernels.planted_attention import BACKWARD, FORWARD, ROPES
from tests.kernels.planted_rows import ELEMENTWISE, NORMS
from tests.kernels.planted_sums import LOSSES, SUMS

PLANTED = [*NORMS, *ELEMENTWISE, *ROPES, *FORWARD, *BACKWARD, *LOSSES, *SUMS]
CHECKS = {str(planted.caught_by): planted.caught_by for planted in PLANTED}


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_error_is_caught(planted: Planted, tmp_path: Path) -> None:
    own = planted.caught_by
    with (
        copies(tmp_path, own.file, planted.module, planted.edits) as tests,
        pytest.raises(AssertionError),
    ):
        own.run(tests)


@pytest.mark.parametrize("file", sorted({own.file for own in CHECKS.values()}))
def test_copies_without_an_error_pass(file: str, tmp_path: Path) -> None:
    """With the arguments given here; tests that take none run as they are in their own file."""
    with copies(tmp_path, file) as tests:
        for own in CHECKS.values():
            if own.file == file and own.arguments:
                own.run(tests)


def test_every_kernel_has_two_errors() -> None:
    counts = Counter(planted.module for planted in PLANTED)
    assert {module for module in kernel_modules() if counts[module] < 2} == set()


OVERSIZED = """
import json, sys, importlib.util
spec = importlib.util.spec_from_file_location("planted", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["planted"] = module
spec.loader.exec_module(module)
from megapipe.kernels.compilation import TARGETS, compile_variant
variants = [v for v in module.variants() if v.name == sys.argv[2]]
compiled = compile_variant(variants[0], TARGETS["sm_90"])
print(json.dumps(compiled.problems))
"""


def test_oversized_block_is_caught(tmp_path: Path) -> None:
    """A tile of 256 x 256 on the warps of one of 128 x 128."""
    source = Path(kernels.__path__[0], "weight_grad.py").read_text(encoding="utf-8")
    assert source.count("Settings(128, 128, 64, 8,") == 1
    path = tmp_path / "oversized.py"
    path.write_text(
        source.replace("Settings(128, 128, 64, 8,", "Settings(256, 256, 16, 8,").replace(
            '"megapipe::', '"oversized::'
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", OVERSIZED, str(path), "weight_grad"],
        env=compiling_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    (problem, *_) = json.loads(done.stdout)
    assert problem.startswith("spills "), problem
