"""Tests import benches to test them, and for nothing else."""

from pathlib import Path

import pytest

from tests.structure.commands import uses_of_benches

ROOT = Path(__file__).parents[2]
TESTS_OF_BENCHES = {
    "tests/tools/test_arguments.py",  # options of all commands, benches among them
    "tests/tools/test_bench.py",
    "tests/tools/test_bench_gpu.py",
    "tests/tools/test_bench_kernels.py",
    "tests/tools/test_bench_pipeline.py",
}


def test_tests_use_benches_only_to_test_them() -> None:
    assert list(uses_of_benches(ROOT, TESTS_OF_BENCHES)) == []
    assert all((ROOT / name).is_file() for name in TESTS_OF_BENCHES)


# --- The rules themselves ------------------------------------------------------------------------


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
    (found,) = uses_of_benches(tmp_path, ())
    assert found.startswith("tests/proof.py imports megapipe.tools.bench")
    assert list(uses_of_benches(tmp_path, ("tests/proof.py",))) == []
