"""`megapipe bench pipeline`: that it measures what it says; how fast is not a test's business."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.errors import MegapipeError
from megapipe.pipeline.schedule import SCHEDULES, Action, Costs, Kind, build_program, simulate
from megapipe.pipeline.schedule.action import sequential
from megapipe.tools.bench import run
from megapipe.tools.bench.pipeline_figures import (
    Cell,
    CellResults,
    MeasuredStep,
    Steps,
    measured,
    replay,
)
from megapipe.tools.bench.torch_pipeline import SENDS_TO_ITSELF, THEIRS

# --- End to end ----------------------------------------------------------------------------------


def test_both_runtimes_do_all_that_their_programs_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each worker refuses to answer unless its stages did the actions of its program, all of them
    and in that order (`_took`), so that an answer is also the proof."""
    file = tmp_path / "results" / "pipeline.json"
    words = "--against=torch --ranks=2 --microbatches=4,5 --virtual=1,2 --unit-ms=1 --repeats=1"
    assert run(["pipeline", *words.split(), f"--json={file}"]) == 0
    content = json.loads(file.read_text())
    assert content["packages"]["torch"]
    assert content["options"]["against"] == "torch"
    rows = content["results"]
    assert {row["schedule"] for row in rows} == set(SCHEDULES)
    for row in rows:
        ours, theirs = row["contenders"]["megapipe"], row["contenders"]["torch"]
        _check(row, ours)
        if row["schedule"] not in THEIRS:
            assert theirs == {"refused": f"torch has no {row['schedule']}"}
            assert row["overhead_ratio"] is None
        elif SENDS_TO_ITSELF and row["schedule"] in ("zb-v", "dualpipe-v"):
            assert "can't have two neighbours on one rank" in theirs["refused"]
        elif row["microbatches"] == 5 and row["schedule"] in ("interleaved-1f1b", "zb-h1"):
            assert "number of rounds" in theirs["refused"]
        else:
            _check(row, theirs)
    captured = capsys.readouterr()
    assert all(name in captured.out for name in SCHEDULES)
    assert "ratio" in captured.out
    assert "repeat 1 of 1" in captured.err


def _check(row: dict, contender: dict) -> None:  # type: ignore[type-arg]
    """The step holds its actions' time and more, and no unit is shorter than was asked for."""
    (step,) = contender["steps"]
    unit = row["unit_ms"] / 1000
    chunks = row["virtual"] * row["microbatches"]
    assert 2 * chunks <= contender["actions"] <= 3 * chunks
    assert step["seconds"] > step["simulated"] >= step["busy"] >= 3 * chunks * unit
    assert {"F", "B"} <= set(step["units"]) or {"F", "I", "W"} <= set(step["units"])
    assert step["units"]["F"] >= unit


def test_ours_alone_computing_on_larger_activations(capsys: pytest.CaptureFixture[str]) -> None:
    """What needs more microbatches than there are is left out, and named."""
    words = "--ranks=2 --schedules=dualpipe-v --microbatches=2,4 --unit-ms=0.5 --repeats=2"
    assert run(["pipeline", *words.split(), "--work=compute", "--floats=70000"]) == 0
    captured = capsys.readouterr()
    assert "dualpipe-v" in captured.out
    assert "torch" not in captured.out
    assert "left out: dualpipe-v, p=2, v=2, m=2, 0.5 ms" in captured.err
    assert "v=1" not in captured.err, "that it has no single chunk is how it is"
    assert "1 cells" in captured.err


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--schedules=1f1b,2f2b", "--schedules: '2f2b' is not one of"),
        ("--ranks=1", "--ranks: '1' must be a whole number, 2 or more"),
        ("--ranks=2,", "--ranks: '' must be a whole number"),
        ("--microbatches=0", "--microbatches: '0' must be"),
        ("--virtual=x", "--virtual: 'x' must be"),
        ("--repeats=0", "--repeats: '0' must be"),
        ("--floats=-1", "--floats: '-1' must be"),
        ("--unit-ms=0", "--unit-ms: '0' must be a number above 0"),
        ("--unit-ms=nan", "--unit-ms: 'nan' must be"),
        ("--unit-ms=two", "--unit-ms: 'two' must be"),
        ("--against=deepspeed", "--against deepspeed is not one of torch"),
        ("--work=play", "--work play is not one of sleep, compute"),
        ("--schedules=zb-v --virtual=1,4", 'nothing is left of zb-v: .*must be 2 with .*"zb-v"'),
        ("--schedules=dualpipe-v --ranks=4 --microbatches=4", "needs 8 microbatches or more"),
    ],
)
def test_wrong_words_are_refused(words: str, message: str) -> None:
    with pytest.raises(MegapipeError, match=message):
        run(["pipeline", *words.split()])


# --- Figures -------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 4), st.integers(8, 11))
def test_replay_is_the_simulation_where_costs_are_equal(name: str, ranks: int, count: int) -> None:
    virtual = SCHEDULES[name].chunks[0]
    program = build_program(name, pipeline=ranks, virtual=virtual, microbatches=count)
    costs = Costs(forward=1.0, backward_input=1.25, backward_weight=0.5)
    took = {action: costs.of(action) for row in sequential(program) for action in row}
    assert replay(sequential(program), took) == simulate(program, costs).makespan


def test_replay_takes_each_action_as_it_was() -> None:
    """Rank 1 starts when the slow forward has ended, and its backward lets rank 0 go on."""
    program = [
        [Action(0, Kind.FORWARD, 0), Action(0, Kind.FORWARD, 1), Action(0, Kind.BACKWARD, 0)],
        [Action(1, Kind.FORWARD, 0), Action(1, Kind.BACKWARD, 0)],
    ]
    took = dict(zip([*program[0], *program[1]], (5.0, 1.0, 2.0, 1.0, 3.0), strict=True))
    assert replay(program, took) == 5 + 1 + 3 + 2


def test_figures_of_a_step() -> None:
    answers = [
        {"begin": 10.0, "end": 14.5, "actions": ["0F0", "0B0"], "took": [1.0, 1.0]},
        {"begin": 10.1, "end": 13.0, "actions": ["1F0", "1B0"], "took": [1.0, 0.5]},
    ]
    step = measured(answers)
    assert step.seconds == 4.5
    assert step.simulated == 3.5
    assert step.busy == 1.75
    assert step.actions == 2
    assert step.bubble == pytest.approx(4.5 / 1.75 - 1)
    assert step.overhead == pytest.approx(0.5)
    assert step.units == {"B": 0.75, "F": 1.0}


def test_a_ratio_needs_two() -> None:
    def steps(*overheads: float) -> Steps:
        return Steps(steps=[MeasuredStep(4 + 2 * over, 4.0, 3.0, 2, {}) for over in overheads])

    cell = Cell(2, 1.0, "1f1b", 1, 4)
    ours = steps(1.0, 9.0, 2.0)
    assert ours.overhead == 2.0, "the median"
    assert CellResults(cell, {"megapipe": ours, "torch": steps(4.0)}).ratio == 0.5
    assert CellResults(cell, {"megapipe": ours, "torch": steps(-0.1)}).ratio is None
    assert CellResults(cell, {"megapipe": ours, "torch": Steps(refused="no")}).ratio is None
    assert CellResults(cell, {"megapipe": ours}).ratio is None
