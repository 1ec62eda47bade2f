"""Who imports the benches: a test that shares something with a bench gets it from the package."""

from collections.abc import Collection
from pathlib import Path

from tests.structure.imports import imports

BENCHES = "megapipe.tools.bench"
TESTS_OF_BENCHES = {
    "tests/tools/test_arguments.py",  # options of all commands, benches among them
    "tests/tools/test_bench.py",
    "tests/tools/test_bench_gpu.py",
    "tests/tools/test_bench_kernels.py",
    "tests/tools/test_bench_pipeline.py",
}


def violations(root: Path, allowed: Collection[str] = TESTS_OF_BENCHES) -> list[str]:
    """`file imports module` for each test outside `allowed` that imports a bench."""
    found = []
    for path in sorted((root / "tests").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        module = name.removesuffix(".py").replace("/", ".")
        used = [one for one in imports(module, path) if f"{one}.".startswith(f"{BENCHES}.")]
        if used and name not in allowed:
            found.append(f"{name} imports {min(used)}")
    return found
