"""`--timeline`: files, tables and metrics of a real run, and what is said when there is none."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from megapipe.pipeline.schedule import build_program
from megapipe.tools.cli import main
from tests.tools.test_train import PP2, Command, column


def amounts(text: str, first: str, last: str) -> list[float]:
    """The milliseconds of the rows from one to another."""
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines()]
    named = [(cells[1], cells[2]) for cells in rows if len(cells) > 4 and cells[1]]
    names = [name for name, _ in named]
    part = named[names.index(first) : names.index(last) + 1]
    return [float(amount.replace(",", "")) for _, amount in part if amount]


def test_a_run_with_a_timeline(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = (PP2, f"--train.run_dir={run_dir}", "--parallel.schedule=zb-h1", "--parallel.data=2")
    said = Command(corpus, *words, "--train.steps=6", "--timeline", "3-5").finish()
    text = (run_dir / "timeline.txt").read_text()
    assert text in said
    (step,) = {int(number) for number in re.findall(r"\nTimeline of step (\d): ", said)}
    assert step in (3, 4, 5)
    assert text.startswith(f"Step {step}, zb-h1 on 2 ranks: ")
    assert "With equal stages the schedule has a bubble of" in text.replace("\n", " ")

    *plan_parts, plan = amounts(text, "work, shared equally", "the plan")
    _, *real_parts, real = amounts(text, "the plan", "reality")
    assert len(real_parts) == 5
    assert sum(plan_parts) == pytest.approx(plan, abs=0.02)
    assert plan + sum(real_parts) == pytest.approx(real, abs=0.05)

    trace = json.loads((run_dir / "timeline.json").read_text())
    slices = Counter(
        (event["args"].get("step"), event["tid"], event["name"])
        for event in trace["traceEvents"]
        if event["ph"] == "X"
    )
    program = build_program("zb-h1", pipeline=2, virtual=1, microbatches=2)
    assert slices == {
        (at, rank, str(action)): 1
        for at in (None, 3, 4, 5)
        for rank, actions in enumerate(program)
        for action in actions
    }
    assert Image.open(run_dir / "timeline.png").width == 1350

    measured, planned = column(run_dir, "bubble"), column(run_dir, "bubble_planned")
    assert measured[0] is None
    assert all(bubble > 0 for bubble in [*measured[1:], *planned])

    again = Command(corpus, *words, "--train.steps=7", "--timeline", "4").finish()
    assert 'logging.timeline = "4" is not after step 6, from which the run goes on' in again


def test_matplotlib_is_missed_before_anything_is_written(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    words = ["train", str(corpus / "run.toml"), f"--train.run_dir={tmp_path}/run"]
    assert main([*words, "--timeline=3"]) == 1
    said = capsys.readouterr().err
    assert said.startswith('megapipe: logging.timeline = "3" draws a picture')
    assert "pip install 'megapipe[plot]'" in said
    assert list(tmp_path.iterdir()) == []


def test_wrong_steps(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(corpus / "run.toml"), "--timeline", "20", "--dry-run"]) == 1
    assert capsys.readouterr().err == (
        'megapipe: command line: logging.timeline = "20" is after the last step, train.steps = 8; '
        "name an earlier one.\n"
    )
