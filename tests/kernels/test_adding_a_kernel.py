"""docs/adding-a-kernel.md does what it says: its files are put where it says into a copy of the
checkout, proven, compiled and given a page there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megapipe import kernels
from megapipe.kernels.compilation import TARGETS
from tests.interpreter import compiling_environment
from tests.kernels import kernel_pages

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-kernel.md").read_text(encoding="utf-8")
KERNEL, EXPORT, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(OVERVIEW,) = re.findall(r"```\n(\|.*?)```", PAGE, re.DOTALL)


def before(path: Path, place: str, added: str) -> None:
    """Put it before a place that the file has once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(place) == 1, (path, place)
    path.write_text(text.replace(place, added + place), encoding="utf-8")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the page's files and lines, compiled rows and the kernel's page."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("megapipe", "kernels", "models", "tools", "tests", "docs"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=unwanted)
    (folder / "kernels" / "relu_squared.py").write_text(KERNEL, encoding="utf-8")
    (folder / "tests" / "kernels" / "test_relu_squared.py").write_text(TEST, encoding="utf-8")
    before(folder / "kernels" / "__init__.py", "from megapipe.kernels.rms_norm", EXPORT)
    before(folder / "kernels" / "__init__.py", '    "rescale",', '    "relu_squared",\n')
    before(folder / "docs" / "kernels.md", "| [`rms_norm`]", OVERVIEW)
    rows = run(folder, "-m", "tests.kernels.compile_kernels", "relu_squared")
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:  # here, and not in a process: it compiles nothing
        patch.setattr(kernels, "__path__", [str(folder / "kernels")])
        assert kernel_pages.main([str(folder), str(folder / "rows.jsonl")]) == 0
    return folder


def run(checkout: Path, *words: str) -> str:
    """Without TRITON_INTERPRET, so that kernels are compiled; the tests' conftest sets it."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=120,
        env=compiling_environment() | {"PYTHONPATH": str(checkout), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_compiles_for_all_targets(checkout: Path) -> None:
    rows = list(map(json.loads, (checkout / "rows.jsonl").read_text().splitlines()))
    found = {(row["kernel"], row["configuration"], row["target"]) for row in rows}
    assert found == {
        (f"relu_squared_{way}", "bf16", target)
        for way in ("forward", "backward")
        for target in TARGETS
    }


def test_its_page_is_made_and_the_others_stay(checkout: Path) -> None:
    page = (checkout / "docs" / "kernels" / "relu_squared.md").read_text(encoding="utf-8")
    assert "\n    dx = 2 dy max(x, 0)\n" in page
    assert "def relu_squared(x: Tensor" in page
    assert "(../../tests/kernels/test_relu_squared.py)" in page
    assert page.count("\n| bf16 | ") == 2
    for path in (ROOT / "docs" / "kernels").glob("*.md"):
        assert (checkout / "docs" / "kernels" / path.name).read_bytes() == path.read_bytes()


def test_its_tests_and_those_of_its_page_pass(checkout: Path) -> None:
    files = ("tests/kernels/test_relu_squared.py", "tests/kernels/test_kernel_pages.py")
    only = ("-k", "relu_squared or overview or exported")
    said = run(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *only)
    assert re.search(r"\d+ passed", said), said
    assert "failed" not in said
    assert "skipped" not in said
