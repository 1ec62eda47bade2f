"""`auto` on the command line: runs, resumes, dry runs, proofs, help."""

import shutil
from pathlib import Path

import pytest

from megapipe.config import load_config
from megapipe.equivalence.shrink import shrink
from megapipe.errors import ScheduleError
from megapipe.models.families import FAMILIES
from megapipe.plan.dry_run import dry_run
from megapipe.plan.program import checked_program, without_auto
from megapipe.tools.cli import main
from tests.config.examples import write
from tests.tools.test_training import Command, column

CONFIGS = Path(__file__).parents[1] / "configs"
AUTO, PP2, V2 = "--parallel.schedule=auto", "--parallel.pipeline=2", "--parallel.virtual=2"


def test_a_resume_takes_the_same_program_and_has_the_same_losses(
    corpus: Path, tmp_path: Path
) -> None:
    shutil.copy(corpus / "run.toml", tmp_path)
    words = [AUTO, PP2, V2, "--checkpoint.every=2", "--optimizer.schedule=constant"]

    def train(name: str, steps: int) -> str:
        run = [f"--train.run_dir={name}", f"--train.steps={steps}"]
        return Command(tmp_path, *words, *run).finish()

    said = train("stopped", 2)
    assert "\nProgram: " in said
    assert "\n  Why: stopped/schedule.txt; the program: stopped/schedule.csv\n" in said
    program = (tmp_path / "stopped" / "schedule.csv").read_bytes()
    assert (tmp_path / "stopped" / "schedule.txt").read_text().startswith("Program: ")
    assert "\nProgram: that of stopped/schedule.csv, from an earlier start" in train("stopped", 4)
    assert (tmp_path / "stopped" / "schedule.csv").read_bytes() == program

    # Another run, with the program put there by hand, goes through without a stop.
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "schedule.csv").write_bytes(program)
    train("whole", 4)
    assert column(tmp_path / "whole", "loss") == column(tmp_path / "stopped", "loss")


def test_a_dry_run_searches_with_estimates(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), [AUTO, V2, "--parallel.data=1"], FAMILIES)
    shown = dry_run(config, "run.toml")
    assert "Schedule: auto, 4 stages, 8 microbatches" in shown
    (program,) = [line for line in shown.splitlines() if line.startswith("Program: ")]
    assert "forwards per step by simulation" in program
    assert "Costs: estimated by FLOPs. A run measures its stages and may choose another." in shown
    assert 'schedule = "auto"' in shown
    placed = "0, 3" if "stages V" in program else "0, 2"
    assert ["0", "0", "0", "0", *placed.split()] in [line.split() for line in shown.splitlines()]


def test_a_dry_run_takes_costs_from_a_file_or_the_program_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "costs.toml").write_text("forward = 1\nbackward_input = 1\nbackward_weight = 1")
    words = [AUTO, f"--parallel.stage_costs={tmp_path}/costs.toml", "--parallel.data=1"]
    config = load_config(write(tmp_path), [*words, f"--train.run_dir={tmp_path}"], FAMILIES)
    shown = dry_run(config, "run.toml")
    assert "25.000 s per step by simulation" in shown  # 8 microbatches and a stage more
    assert f"Costs: from {tmp_path}/costs.toml." in shown
    without_auto(config, tmp_path)  # where a run would have it
    assert f"\nProgram: that of {tmp_path}/schedule.csv\n" in dry_run(config, "run.toml")


def test_a_program_that_does_not_fit_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    """As in a proof, whose layout may be smaller than the run's."""
    words = [AUTO, f"--train.run_dir={tmp_path}"]
    without_auto(load_config(write(tmp_path), [*words, "--parallel.data=1"], FAMILIES), tmp_path)
    smaller = load_config(write(tmp_path), [*words, "--parallel.data=2"], FAMILIES)
    _, lines = without_auto(smaller, tmp_path)
    assert lines[0].startswith(
        f"Not the program of {tmp_path}/schedule.csv, which does not fit here: {tmp_path}/schedule"
        ".csv: the program has 8 microbatches, and the config has 4 "
    )
    assert lines[1].startswith("Program: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel.activation_limit=1"], '"1f1b" has activations of 2 microbatches live'),
        (["--parallel.activation_limit=100 KB"], "below what any schedule needs"),
        ([AUTO, "--parallel.activation_limit=0.2"], "below what any schedule needs"),
    ],
)
def test_a_dry_run_refuses_what_exceeds_the_limit(
    words: list[str], message: str, tmp_path: Path
) -> None:
    config = load_config(write(tmp_path), ["--parallel.data=1", *words], FAMILIES)
    with pytest.raises(ScheduleError, match=message):
        dry_run(config, "run.toml")


def test_a_memory_limit_holds_by_estimated_activations(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path),
        ["--parallel.data=1", "--parallel.schedule=gpipe", "--parallel.activation_limit=2 MB"],
        FAMILIES,
    )
    with pytest.raises(ScheduleError, match=r'"gpipe" has activations of [\d.]+ MiB live'):
        checked_program(config)


def test_verify_proves_a_searched_program(capfd: pytest.CaptureFixture[str]) -> None:
    words = [AUTO, PP2, V2, "--parallel.data=1", "--parallel.activation_limit=1.5"]
    assert main(["verify", str(CONFIGS / "gpt2_shape.toml"), *words, "--steps", "1"]) == 0
    out = capfd.readouterr().out
    assert "Program: " in out
    assert "at most 1.5 microbatches live" in out
    assert "Costs: estimated by FLOPs." in out
    assert "PASSED: the layout equals one process over one step, to 1e-09." in out


def test_a_small_layout_keeps_the_share_of_the_limit() -> None:
    """Of 16 ranks 8 are left, so half the microbatches; memory and times are not those of the
    small model."""
    words = [AUTO, "--parallel.pipeline=16", "--model.num_layers=16", "--parallel.data=1"]

    def small(*more: str) -> tuple[object, object]:
        config = load_config(CONFIGS / "gpt2_shape.toml", [*words, *more], FAMILIES)
        parallel = shrink(config)[0].parallel
        return parallel.activation_limit, parallel.stage_costs

    assert small("--parallel.activation_limit=6", "--parallel.stage_costs=x") == (3.0, None)
    assert small("--parallel.activation_limit=1") == (1.0, None)
    assert small("--parallel.activation_limit=1 GiB") == (None, None)


def test_help_names_both_forms_of_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--parallel.activation_limit NUMBER|TEXT|none" in capsys.readouterr().out
