"""Programs of a config: by name, or from a file.

Refusals are seen as a user sees them: one message, from the dry run of the command line.
"""

from pathlib import Path

import pytest

from megapipe.config import Config, check_layout
from megapipe.config.load import load_config
from megapipe.errors import ScheduleError
from megapipe.layout.program import (
    lowered_program,
    stage_placement,
    training_program,
    with_program,
)
from megapipe.models.families import FAMILIES
from megapipe.pipeline.schedule import SCHEDULES, Program, build_program, lower, to_csv
from megapipe.pipeline.schedule.action import stage_ranks
from megapipe.tools.cli import main
from tests.config.examples import write
from tests.pipeline.programs import make, random_program

FROM_FILE = ("--parallel.schedule=csv", "--parallel.schedule_file=program.csv")
MICROBATCHES = 8  # of the example config: 16 sequences in microbatches of 2


def load(folder: Path, *overrides: str) -> Config:
    config = load_config(write(folder), list(overrides), FAMILIES)
    return check_layout(config, config.parallel.tensor * config.parallel.pipeline)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_name_and_from_its_file_it_is_the_same(folder: Path, name: str) -> None:
    virtual = SCHEDULES[name].chunks[0]
    shape = ("--parallel.pipeline=4", f"--parallel.virtual={virtual}")
    named = load(folder, *shape, f"--parallel.schedule={name}")
    program = build_program(name, pipeline=4, virtual=virtual, microbatches=MICROBATCHES)
    assert training_program(named) == program
    for text in (to_csv(program), to_csv(lower(program)), "\ufeff" + to_csv(program)):
        (folder / "program.csv").write_text(text, encoding="utf-8")
        filed = load(folder, *shape, *FROM_FILE)
        assert lower(training_program(filed)) == lower(program)
        assert stage_placement(filed) == stage_placement(named)
        assert stage_ranks(program) == dict(enumerate(stage_placement(named)))


@pytest.mark.parametrize("placement", [[0, 0, 0, 1], [1, 0, 1, 1]])
def test_ranks_may_have_unequal_numbers_of_stages(folder: Path, placement: list[int]) -> None:
    program = random_program(0, placement, MICROBATCHES, split=True)
    (folder / "program.csv").write_text(to_csv(program), encoding="utf-8")
    config = load(folder, "--parallel.virtual=2", *FROM_FILE)
    assert lowered_program(config) == lower(program)
    assert stage_placement(config) == placement


def test_a_config_carries_its_program_as_long_as_it_is_of_this_file_and_shape(
    folder: Path,
) -> None:
    file = folder / "program.csv"
    file.write_text(to_csv(GOOD), encoding="utf-8")
    config = with_program(load(folder, *FROM_FILE))
    file.unlink()
    assert with_program(config) is config
    assert training_program(config) == GOOD
    assert lowered_program(config) == lower(GOOD)
    assert stage_placement(config) == [0, 1]
    train = config.train.model_copy(update={"global_batch_size": 8})
    parallel = config.parallel.model_copy(update={"schedule_file": "another.csv"})
    for change in ({"train": train}, {"parallel": parallel}):
        with pytest.raises(ScheduleError, match="can't be read"):
            training_program(config.model_copy(update=change))
    parallel = config.parallel.model_copy(update={"activation_limit": 1.0})
    with pytest.raises(ScheduleError, match="activations of 2 microbatches live"):
        training_program(config.model_copy(update={"parallel": parallel}))


# --- Refusals ------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one message of a dry run that ends with status 1."""
    assert main(["train", "run.toml", "--dry-run", *overrides]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("megapipe: ")
    assert shown.err.count("megapipe: ") == 1
    return shown.err.removeprefix("megapipe: ").rstrip("\n")


def edited(program: Program, was: str, now: str) -> str:
    """The program's text with one action replaced."""
    before, found, after = to_csv(program).partition(was)
    assert found
    return before + now + after


GOOD = make("1f1b", 2, 1, MICROBATCHES)
REFUSALS = {
    "a missing action": (
        edited(GOOD, "0B3,", ""),
        "program.csv: 0B3 is missing: rank 0 must do it, as every stage computes 8 microbatches",
    ),
    "an action that is there twice": (
        edited(GOOD, "1F4,", "1F4,1F4,"),
        "program.csv: 1F4 is done twice: as action 8 of rank 1 and as action 9 of rank 1",
    ),
    "a weight gradient too many": (
        edited(GOOD, "1B2,", "1B2,1I2,1W2,"),
        "program.csv: 1B2 (action 5 of rank 1) is one too many: the stage has the input gradient "
        "and the weight gradient of this microbatch apart",
    ),
    "a cycle": (
        edited(GOOD, "0F0,0F1,0B0", "0F0,0B0,0F1").replace("1B0,1F1", "1F1,1B0"),
        "program.csv: the program deadlocks:\n"
        "  rank 0 waits in 0B0 (action 1) for 1B0 (action 2 of rank 1)\n"
        "  rank 1 waits in 1F1 (action 1) for 0F1 (action 2 of rank 0)",
    ),
    "an order that a rank can't have": (
        edited(GOOD, "1F0,1B0", "1B0,1F0"),
        "program.csv: 1B0 (action 0 of rank 1) needs 1F0, which comes later on the same rank, as "
        "action 1",
    ),
    "too few ranks": (
        to_csv(make("gpipe", 1, 1, MICROBATCHES)),
        "program.csv: the program has 1 rank, and parallel.pipeline = 2: make them equal",
    ),
    "too many ranks": (
        to_csv(make("gpipe", 3, 1, MICROBATCHES)),
        "program.csv: the program has 3 ranks, and parallel.pipeline = 2: make them equal",
    ),
    "an idle rank": (
        to_csv(make("interleaved-1f1b", 1, 2, MICROBATCHES)) + ",,\n",
        "program.csv: rank 1 (line 2) computes nothing: give it a stage, or remove the line and "
        "lower parallel.pipeline = 2",
    ),
    "a rank that only receives": (
        "1RECV_F0\n" + to_csv(make("interleaved-1f1b", 1, 2, MICROBATCHES)),
        "program.csv: rank 0 (line 1) computes nothing: give it a stage, or remove the line and "
        "lower parallel.pipeline = 2",
    ),
    "too many stages": (
        to_csv(make("zb-v", 2, 2, MICROBATCHES)),
        "program.csv: the program has 4 stages, and parallel.pipeline * parallel.virtual = 2: "
        "make them equal",
    ),
    "a stage on two ranks": (
        edited(GOOD, "1F0", "1F0,0F0"),
        "program.csv: stage 0 is computed on rank 0 and, by 0F0, on rank 1",
    ),
    "a stage that no rank has": (
        to_csv(GOOD).replace("1F", "2F").replace("1B", "2B"),
        "program.csv: no rank computes stages [1]",
    ),
    "too few microbatches": (
        to_csv(make("1f1b", 2, 1, 4)),
        "program.csv: the program has 4 microbatches, and the config has 8 "
        "(train.global_batch_size / (train.micro_batch_size * parallel.data)): make them equal",
    ),
    "no backward": (
        to_csv(make("forward", 2, 1, MICROBATCHES)),
        "program.csv: the program has no backward: nothing would be trained",
    ),
    "no action": (
        "0F0,what\n1F0\n",
        "program.csv: 'what' is not an action: expected, say, 2F0 or 1SEND_B3",
    ),
    "nothing": (
        "\n",
        "program.csv: the program has 0 ranks, and parallel.pipeline = 2: make them equal",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_file_that_is_no_program_of_the_config(
    folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    text, message = REFUSALS[case]
    write(folder)
    (folder / "program.csv").write_text(text, encoding="utf-8")
    assert refused(capsys, *FROM_FILE) == message


def test_a_file_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder)
    said = "program.csv: it can't be read as a program: No such file or directory"
    assert refused(capsys, *FROM_FILE) == said
    (folder / "program.csv").write_bytes(b"\xff\xfe0F0")
    assert "program.csv: it can't be read as a program" in refused(capsys, *FROM_FILE)


def test_stages_that_are_not_neighbours(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks 0 1 2 3 in the order 0 2 1 3."""
    program = make("gpipe", 4, 1, MICROBATCHES)
    program[1], program[2] = program[2], program[1]
    write(folder)
    (folder / "program.csv").write_text(to_csv(program), encoding="utf-8")
    said = refused(capsys, *FROM_FILE, "--parallel.pipeline=4")
    assert said.startswith("program.csv: stages 0 and 1 lie on ranks 0 and 2, which are not ")


def test_a_missing_line_is_a_missing_rank(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it stood: in the middle, stages are missing because of it."""
    lines = to_csv(make("1f1b", 4, 1, MICROBATCHES)).splitlines(keepends=True)
    write(folder)
    for missing in range(4):
        text = "".join(lines[:missing] + lines[missing + 1 :])
        (folder / "program.csv").write_text(text, encoding="utf-8")
        assert refused(capsys, *FROM_FILE, "--parallel.pipeline=4") == (
            "program.csv: the program has 3 ranks, and parallel.pipeline = 4: make them equal"
        )


@pytest.mark.parametrize(
    ("pipeline", "layers", "limit", "fitting"),
    [
        (4, 8, 3, '"auto", "v-half" (3, parallel.virtual = 2), "v-min" (2, parallel.virtual = 2)'),
        (4, 7, 3, '"auto"'),
        (1, 8, 1, '"auto", "1f1b" (1), "zb-h1" (1), "zb-h2" (1)'),
    ],
)
def test_advised_schedules_have_layers_enough_for_their_stages(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    pipeline: int,
    layers: int,
    limit: int,
    fitting: str,
) -> None:
    write(folder)
    said = refused(
        capsys,
        "--parallel.schedule=gpipe",
        f"--parallel.pipeline={pipeline}",
        f"--model.num_layers={layers}",
        f"--parallel.activation_limit={limit}",
    )
    assert said.endswith(f"or take a parallel.schedule that keeps to it: {fitting}.")


def test_more_microbatches_needed_than_there_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder)
    words = ("--parallel.schedule=dualpipe-v", "--parallel.virtual=2", "--parallel.pipeline=2")
    said = refused(capsys, *words, "--train.global_batch_size=6")
    assert said == (
        'parallel.schedule = "dualpipe-v" needs 4 microbatches or more in a pipeline of 2; there '
        "are 3. Raise train.global_batch_size to at least 4 * train.micro_batch_size * "
        "parallel.data, lower train.micro_batch_size, or take another schedule."
    )
