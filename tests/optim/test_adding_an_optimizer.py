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
from tests.worked_examples import ROOT, blocks, copy_source, replace, run, run_tests

PAGE = "adding-an-optimizer.md"
RULE, EXAMPLE, TEST = blocks(PAGE, "python")
(SHOWN,) = (block for block in blocks(PAGE, "") if block.startswith("adamw"))
(COMMAND,) = (line.removeprefix("megapipe ").strip() for line in blocks(PAGE, "sh"))
RULE_FILE = Path("megapipe/optim/rules/lion.py")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the page's two files."""
    folder = copy_source(tmp_path_factory.mktemp("checkout"), others=("tests",))
    (folder / RULE_FILE).write_text(RULE, encoding="utf-8")
    (folder / "tests" / "optim" / "rules" / "test_lion.py").write_text(TEST, encoding="utf-8")
    write(folder)
    return folder


def test_the_test_of_the_page_and_those_of_all_optimizers_pass(checkout: Path) -> None:
    files = ("tests/optim/rules/test_lion.py", "tests/optim/test_rules.py")
    said = run_tests(checkout, "-v", *files, "-k", "lion")
    passed = set(re.findall(r"::(\w+)\S* PASSED", said))
    own = (ROOT / "tests" / "optim" / "test_rules.py").read_text(encoding="utf-8")
    assert passed == {"test_updates_are_those_of_the_paper", *re.findall(r"def (test_\w+)", own)}


def test_a_mistake_in_the_formula_is_found(checkout: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(checkout, wrong, symlinks=True)
    replace(wrong / RULE_FILE, ".sign_()", "")
    assert "1 failed" in run_tests(wrong, "tests/optim/rules/test_lion.py", status=1)


def test_the_example_prints_what_the_page_shows(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLE],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(checkout)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == SHOWN


def test_the_config_and_the_command_line_know_it(checkout: Path) -> None:
    said = run(checkout, *COMMAND.split(), "--dry-run")
    assert 'name = "lion"' in said
    assert re.search(r"betas = \[\s*0\.9,\s*0\.99,?\s*\]", said), said
    helped = " ".join(run(checkout, "train", "--help").split())
    assert "--optimizer.name adamw|lion|sgd" in helped
    assert "Default: [0.9, 0.95]. lion: Share of the average" in helped
    words = (*COMMAND.split(), "--dry-run", "--optimizer.epsilon=1e-6")
    said = run(checkout, *words, status=1)
    assert 'epsilon = 1e-06 has no effect with optimizer.name = "lion"' in said
