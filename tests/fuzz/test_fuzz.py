"""A minute of the fuzzer with cases that are always the same, and faults that it has to find."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz.case import Command
from tests.fuzz.planted import (
    PLANTED,
    cuts_the_metrics,
    damages_a_checkpoint,
    leaves_a_program_running,
    misses_a_step,
    removes_a_file,
    stops_before_the_end,
    writes_over_the_config,
)
from tests.fuzz.runner import ROOT, System
from tests.fuzz.stories import check_account, killed
from tests.fuzz.worker import Worker, open_worker
from tests.fuzz.world import World

SEED, CASES = 20, 40


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Signals come after steps that are counted, not at moments that a clock chooses."""
    work = tmp_path_factory.mktemp("fuzz")
    with open_worker(work, System(), seed=SEED, only=None, quick=True) as one:
        yield one


@pytest.mark.timeout(900)
def test_random_cases(worker: Worker) -> None:
    answers = [worker.run(number) for number in range(CASES)]
    found = [(answer["case"], *text) for answer in answers for text in answer["findings"]]
    assert not found, found
    assert {"train", "generate", "(feed)"} <= {
        name.removesuffix(" *") for answer in answers for name in answer["counts"]
    }


def test_the_command_line_prints_what_it_finds_and_how_to_find_it_again(tmp_path: Path) -> None:
    fault = "tests.fuzz.planted:warns_like_a_library"
    words = ["--only", "words", "--megapipe", fault, "--cases", "1", "--jobs", "1", "--seed", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *words, "--work", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "words: case 0" in done.stdout
    assert "FutureWarning: planted" in done.stdout
    assert "python -m tests.fuzz --seed 8 --case 0 --only words" in done.stdout
    assert re.search(r"^all +\d+ +\d+$", done.stdout, re.MULTILINE)


def test_a_shell_script_does_what_the_runner_did(worker: Worker) -> None:
    world = worker.world(0, System())
    odd = "a'b\n\udcff.toml"
    command = Command(("plan", odd, "--out", "x y.png"), {"COLUMNS": "7", "HOME": None})
    ending = world.run(command)
    script = world.folder / "again.sh"
    script.write_text(world.script(""), encoding="utf-8")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    again = subprocess.run(["bash", str(script)], capture_output=True, env={"PATH": path})
    assert (again.returncode, again.stderr) == (ending.status, ending.stderr)
    assert ending.status == 1


# --- Planted faults -------------------------------------------------------------------------------


def commands(world: World) -> None:
    """One that does its work, and two that can't."""
    world.run(Command(("schema",)))
    world.run(Command(("schema",), streams=("null", "full", "file")))
    world.run(Command(("train", "none.toml")))


def one_command(world: World) -> None:
    world.run(Command(("schema",)))


def run(world: World) -> None:
    """A short run."""
    world.stock.lend(world.folder, "tokenizer.model", "text.txt", "run.toml")
    world.run(Command(("train", "run.toml", "--train.steps=3")))


def account(world: World) -> None:
    """Three rows, one of which is none."""
    rows = [json.dumps({"text": f"{number} of three"}) for number in range(3)]
    rows[1] = "{"
    (world.folder / "rows.jsonl").write_text("\n".join(rows))
    check_account(world, "rows.jsonl", "file", streams=1, length=1)


OF_CHECKS = {"account": account, "resume": killed}
OF_FAULTS = {
    leaves_a_program_running: one_command,
    stops_before_the_end: run,
    cuts_the_metrics: run,
    misses_a_step: run,
    damages_a_checkpoint: run,
    writes_over_the_config: run,
    removes_a_file: run,
}


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(worker: Worker, fault: Callable[[], int]) -> None:
    check = PLANTED[fault]
    if check == "network" and not worker.runner.isolated:
        pytest.skip("needs the right to make a network namespace")
    name = f"{fault.__module__}:{fault.__name__}"
    world = worker.world(0, System(feed=name) if check == "account" else System(megapipe=name))
    story = OF_FAULTS.get(fault) or OF_CHECKS.get(check, commands)
    story(world)
    assert check in {found.check for found in world.findings}


@pytest.mark.parametrize("story", [commands, run, account, killed])
def test_nothing_is_found_where_nothing_is_planted(
    worker: Worker, story: Callable[[World], None]
) -> None:
    world = worker.world(0, System())
    story(world)
    assert world.findings == []
