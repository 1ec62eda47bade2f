"""`auto` on the command line: runs, resumes, equivalence checks, help."""

import shutil
from pathlib import Path

import pytest

from megapipe.tools.cli import main
from tests.tools.test_train import Command, column

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


def test_verify_proves_a_searched_program(capfd: pytest.CaptureFixture[str]) -> None:
    words = [AUTO, PP2, V2, "--parallel.data=1", "--parallel.activation_limit=1.5"]
    assert main(["verify", str(CONFIGS / "gpt2_shape.toml"), *words, "--steps", "1"]) == 0
    out = capfd.readouterr().out
    assert "Program: " in out
    assert "at most 1.5 microbatches live" in out
    assert "Costs: estimated by FLOPs." in out
    assert "PASSED: the layout equals one process over one step, to 1e-09." in out


def test_help_names_both_forms_of_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--parallel.activation_limit NUMBER|TEXT|none" in capsys.readouterr().out
