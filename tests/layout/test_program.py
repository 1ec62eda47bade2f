"""Programs of a config: by name, or from a file.

Refusals are seen as a user sees them: one message, from the dry run of the command line.
"""

from pathlib import Path

import pytest

from megapipe.config import Config
from megapipe.config.load import load_config
from megapipe.errors import ScheduleError
from megapipe.layout.program import ResolvedProgram, looped_config, resolve_program
from megapipe.models.families import FAMILIES
from megapipe.pipeline.schedule import SCHEDULES, Program, build_program, lower, to_csv
from megapipe.pipeline.schedule.action import stage_ranks
from megapipe.pipeline.schedule.stored import UnfitProgramError
from megapipe.tools.cli import main
from tests.config.examples import write
from tests.layouts import layout_of
from tests.pipeline.programs import make, random_program

FROM_FILE = ("--parallel.schedule=csv", "--parallel.schedule_file=program.csv")
MICROBATCHES = 8  # of the example config: 16 sequences in microbatches of 2


def load(folder: Path, *overrides: str) -> Config:
    return load_config(write(folder), [*overrides, "--parallel.data=1"], FAMILIES)


def program(config: Config, content: bytes | None = None) -> ResolvedProgram:
    return resolve_program(config, MICROBATCHES, content)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_name_and_from_its_file_it_is_the_same(folder: Path, name: str) -> None:
    virtual = SCHEDULES[name].chunks[0]
    shape = ("--parallel.pipeline=4", f"--parallel.virtual={virtual}")
    named = program(load(folder, *shape, f"--parallel.schedule={name}"))
    assert named.compute == build_program(
        name, pipeline=4, virtual=virtual, microbatches=MICROBATCHES
    )
    actions, communicating = to_csv(named.compute), to_csv(named.lowered)
    for text in (actions, communicating, "\ufeff" + actions):
        (folder / "program.csv").write_text(text, encoding="utf-8")
        filed = program(load(folder, *shape, *FROM_FILE))
        assert filed.lowered == lower(filed.compute) == named.lowered
        assert filed.placement == named.placement
        assert stage_ranks(named.compute) == dict(enumerate(named.placement))


@pytest.mark.parametrize("placement", [[0, 0, 0, 1], [1, 0, 1, 1]])
def test_ranks_may_have_unequal_numbers_of_stages(folder: Path, placement: list[int]) -> None:
    given = random_program(0, placement, MICROBATCHES, split=True)
    (folder / "program.csv").write_text(to_csv(given), encoding="utf-8")
    found = program(load(folder, "--parallel.virtual=2", *FROM_FILE))
    assert found.lowered == lower(given)
    assert found.placement == placement


def test_a_layout_keeps_its_program_when_the_file_is_gone(folder: Path) -> None:
    file = folder / "program.csv"
    file.write_text(to_csv(GOOD), encoding="utf-8")
    layout = layout_of(load(folder, *FROM_FILE))
    file.unlink()
    assert layout.program.compute == GOOD
    assert layout.lowered == lower(GOOD)
    assert layout.placement == [0, 1]
    with pytest.raises(ScheduleError, match="can't be read"):
        layout_of(layout.config)


def test_a_file_that_was_read_already_is_not_read_again(folder: Path) -> None:
    content = to_csv(GOOD).encode()
    config = load(folder, *FROM_FILE)
    assert program(config, content).compute == GOOD
    with pytest.raises(UnfitProgramError, match="has 8 microbatches, and the config has 4"):
        resolve_program(config, 4, content)
    limited = load(folder, *FROM_FILE, "--parallel.activation_limit=1")
    with pytest.raises(ScheduleError, match="activations of 2 microbatches live"):
        program(limited, content)


def test_auto_has_no_program_before_it_was_searched_for(folder: Path) -> None:
    config = load(folder, "--parallel.schedule=auto")
    with pytest.raises(UnfitProgramError, match=r"there is no runs/x/schedule\.csv yet"):
        program(config)
    assert program(config, to_csv(GOOD).encode()).compute == GOOD
    limited = load(folder, "--parallel.schedule=auto", "--parallel.activation_limit=1")
    with pytest.raises(UnfitProgramError, match="activations of 2 microbatches live"):
        program(limited, to_csv(GOOD).encode())
    with pytest.raises(ScheduleError, match=r"not an action.*\. Delete the file to search anew\."):
        program(config, b"0F0,what\n1F0\n")


def test_the_same_stages_in_a_loop(folder: Path) -> None:
    for virtual, name in ((1, "1f1b"), (2, "interleaved-1f1b")):
        words = ("--parallel.schedule=auto", f"--parallel.virtual={virtual}")
        looped = looped_config(load(folder, *words, "--parallel.activation_limit=3"))
        assert looped == load(folder, f"--parallel.schedule={name}", *words[1:])
        assert program(looped).placement == [0, 1] * virtual


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
