"""Tests import benches only to test them."""

from pathlib import Path

import pytest

from tests.structure.bench_imports import TESTS_OF_BENCHES, violations

ROOT = Path(__file__).parents[2]


def test_tests_use_benches_only_to_test_them() -> None:
    assert violations(ROOT) == []
    users = {line.split()[0] for line in violations(ROOT, allowed=())}
    assert users == TESTS_OF_BENCHES, "none is listed in vain"


@pytest.mark.parametrize(
    "line",
    [
        "from megapipe.tools.bench.kernels_cases import Case",
        "from megapipe.tools import bench",
        "def f():\n    import megapipe.tools.bench.train",
    ],
)
def test_a_test_that_borrows_from_a_bench_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "proof.py").write_text(line)
    (tmp_path / "tests" / "other.py").write_text("from megapipe.tools import benches\n")
    (found,) = violations(tmp_path)
    assert found.startswith("tests/proof.py imports megapipe.tools.bench")
    assert violations(tmp_path, allowed=("tests/proof.py",)) == []
