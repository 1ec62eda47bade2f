"""docs/adding-an-optimizer.md does what it says: its two files are put where it says into a copy of
the checkout, and everything else finds them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.examples import write

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-an-optimizer.md").read_text(encoding="utf-8")
RULE, EXAMPLE, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(SHOWN,) = re.findall(r"```\n(adamw.*?)```", PAGE, re.DOTALL)
(COMMAND,) = re.findall(r"```sh\nmegapipe (.*?)\n```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the page's two files."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("megapipe", "kernels", "models", "tools", "tests"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=unwanted)
    (folder / "megapipe" / "optim" / "rules" / "lion.py").write_text(RULE, encoding="utf-8")
    (folder / "tests" / "optim" / "rules" / "test_lion.py").write_text(TEST, encoding="utf-8")
    write(folder)
    return folder


def run(checkout: Path, *words: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(checkout), "COLUMNS": "120"},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_test_of_the_page_and_those_of_all_optimizers_pass(checkout: Path) -> None:
    files = ("tests/optim/rules/test_lion.py", "tests/optim/test_rules.py")
    said = run(checkout, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", "lion")
    passed = set(re.findall(r"::(\w+)\S* PASSED", said))
    own = (ROOT / "tests" / "optim" / "test_rules.py").read_text(encoding="utf-8")
    assert passed == {"test_updates_are_those_of_the_paper", *re.findall(r"def (test_\w+)", own)}


def test_a_mistake_in_the_formula_is_found(checkout: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(checkout, wrong, symlinks=True)
    file = wrong / "megapipe" / "optim" / "rules" / "lion.py"
    assert RULE.count(".sign_()") == 1
    file.write_text(RULE.replace(".sign_()", ""), encoding="utf-8")
    words = ("-m", "pytest", "-p", "no:cacheprovider", "tests/optim/rules/test_lion.py")
    assert "1 failed" in run(wrong, *words, status=1)


def test_the_example_prints_what_the_page_shows(checkout: Path) -> None:
    assert run(checkout, "-c", EXAMPLE) == SHOWN


def test_the_config_and_the_command_line_know_it(checkout: Path) -> None:
    said = run(checkout, "-m", "megapipe", *COMMAND.split(), "--dry-run")
    assert 'name = "lion"' in said
    assert re.search(r"betas = \[\s*0\.9,\s*0\.99,?\s*\]", said), said
    helped = " ".join(run(checkout, "-m", "megapipe", "train", "--help").split())
    assert "--optimizer.name adamw|lion|sgd" in helped
    assert "Default: [0.9, 0.95]. lion: Share of the average" in helped
    words = (*COMMAND.split(), "--dry-run", "--optimizer.epsilon=1e-6")
    said = run(checkout, "-m", "megapipe", *words, status=1)
    assert 'epsilon = 1e-06 has no effect with optimizer.name = "lion"' in said
