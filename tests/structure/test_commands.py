"""tools/ is the command line and nothing else."""

from pathlib import Path

import pytest

from tests.structure.commands import LONGEST, command_lines, too_long, uses_of_benches

ROOT = Path(__file__).parents[2]
LONG = {
    "arguments.py": "the parser of all commands",
    "cli.py": "finds the command and turns its errors into one message",
    "console.py": "standard output and error of all commands",
    "dry_run.py": "waits for the resolved layout: the report moves into megapipe/",
    "planning.py": "waits for the resolved layout and the model family: moves into megapipe/",
    "shrink.py": "waits for the resolved layout: the equivalence check moves into megapipe/",
    "training.py": "waits for the model family: starting a run moves into megapipe/train/",
}
"""Files of more than LONGEST lines, and why."""
MOST = 2_400
"""Lines of tools/ without benches. To be 1,500 when those that wait have moved."""
TESTS_OF_BENCHES = {
    "tests/tools/test_arguments.py",  # options of all commands, benches among them
    "tests/tools/test_bench.py",
    "tests/tools/test_bench_gpu.py",
    "tests/tools/test_bench_kernels.py",
    "tests/tools/test_bench_pipeline.py",
}


def test_a_command_is_a_small_file() -> None:
    assert len(command_lines(ROOT)) > 10, "the walk finds the files"
    assert too_long(ROOT, LONG) == []


def test_the_command_line_is_small() -> None:
    assert sum(command_lines(ROOT).values()) <= MOST


def test_tests_use_benches_only_to_test_them() -> None:
    assert list(uses_of_benches(ROOT, TESTS_OF_BENCHES)) == []
    assert all((ROOT / name).is_file() for name in TESTS_OF_BENCHES)


# --- The rules themselves ------------------------------------------------------------------------


@pytest.mark.parametrize(("lines", "allowed"), [(LONGEST + 1, ()), (LONGEST, ("train.py",))])
def test_a_long_command_and_a_stale_exception_are_found(
    tmp_path: Path, lines: int, allowed: tuple[str, ...]
) -> None:
    (tmp_path / "tools" / "bench").mkdir(parents=True)
    (tmp_path / "tools" / "bench" / "long.py").write_text("\n" * 200)
    (tmp_path / "tools" / "train.py").write_text("x = 1\n" * lines)
    assert len(too_long(tmp_path, allowed)) == 1
    assert command_lines(tmp_path) == {"train.py": lines}
    fine = ("train.py",) if lines > LONGEST else ()
    assert too_long(tmp_path, fine) == []


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
