"""docs/adding-a-schedule.md does what it says: its code is put where it says, and everything else
finds it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megapipe.pipeline.schedule import Program, generators, lower, validate
from megapipe.pipeline.schedule.definition import Schedule
from tests.config.examples import write
from tests.pipeline.test_executor import check_as_one_process

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "adding-a-schedule.md").read_text(encoding="utf-8")
GENERATOR, EXAMPLE, TABLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(SHOWN,) = re.findall(r"```\n(1f1b.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Schedule]:
    """The schedule of the page, found in a folder that is added to that of the generators."""
    (tmp_path / "eager.py").write_text(GENERATOR, encoding="utf-8")
    monkeypatch.setattr(generators, "__path__", [*generators.__path__, str(tmp_path)])
    before = set(generators.find_schedules()) - {"eager-1f1b"}
    found = generators.find_schedules()
    assert set(found) == before | {"eager-1f1b"}
    yield found["eager-1f1b"]
    sys.modules.pop(f"{generators.__name__}.eager")
    del generators.eager  # type: ignore[attr-defined]


def test_the_executor_runs_it(eager: Schedule) -> None:
    pipeline = 3
    program: Program = eager.generate(pipeline, 1, 5)
    validate(lower(program), max_live=2 * pipeline - 1)
    check_as_one_process(program)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source with the page's file, and the page's lines in the tables of the test."""
    folder = tmp_path_factory.mktemp("house")
    for part in ("megapipe", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    schedule = folder / "megapipe" / "pipeline" / "schedule"
    (schedule / "generators" / "eager.py").write_text(GENERATOR, encoding="utf-8")
    tests = folder / "tests" / "pipeline" / "schedule" / "test_generators.py"
    source = tests.read_text(encoding="utf-8")
    begin = source.index("def test_every_schedule_has_its_forms")
    tests.write_text(source[:begin] + TABLES + "\n\n" + source[begin:], encoding="utf-8")
    return folder


def run(house: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=house,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(house), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_prints_what_the_page_shows(house: Path) -> None:
    assert run(house, "-c", EXAMPLE) == SHOWN


def test_the_config_and_the_command_line_know_it(house: Path) -> None:
    write(house)
    words = ("train", "run.toml", "--dry-run", "--parallel.schedule=eager-1f1b")
    assert "Schedule: eager-1f1b, 2 stages, 8 microbatches" in run(house, "-m", "megapipe", *words)


def test_the_lines_in_the_test_are_all_that_it_needs(house: Path) -> None:
    file = "tests/pipeline/schedule/test_generators.py"
    words = ("-m", "pytest", "-v", "-p", "no:cacheprovider", file, "-k", "eager or forms or run")
    said = run(house, *words)
    for test in ("its_forms", "of_the_docstring[eager-1f1b]", "can_run_where_its_placement_says"):
        assert re.search(rf"{re.escape(test)} PASSED", said), said
