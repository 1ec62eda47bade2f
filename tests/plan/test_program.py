"""The layout of a plan: the program in place of `auto`, and limits by estimated activations."""

from pathlib import Path

import pytest

from megapipe.config import Config, load_config
from megapipe.errors import ScheduleError
from megapipe.layout.estimates import stage_costs
from megapipe.layout.layout import Layout
from megapipe.models.families import FAMILIES
from megapipe.pipeline.schedule import Costs, from_csv, simulate
from megapipe.plan import program
from megapipe.plan.program import EstimatedTimes, estimated_times
from tests.config.examples import write
from tests.layouts import layout_of

AUTO = "--parallel.schedule=auto"
FAMILY = FAMILIES["gpt"]


def load(folder: Path, *words: str) -> Config:
    run = (f"--train.run_dir={folder}/run", "--parallel.data=1")
    return load_config(write(folder), [*run, *words], FAMILIES)


def plan_layout(
    config: Config, folder: Path, times: EstimatedTimes | None = None
) -> tuple[Layout, list[str]]:
    return program.plan_layout(config, None, FAMILY, folder, times)


def test_a_named_schedule_is_the_layout_of_its_config(tmp_path: Path) -> None:
    config = load(tmp_path)
    layout, lines = plan_layout(config, tmp_path)
    assert lines == []
    assert layout == layout_of(config)
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"], "nothing is written"


def test_auto_becomes_a_program_in_a_file(tmp_path: Path) -> None:
    layout, lines = plan_layout(load(tmp_path, AUTO), tmp_path)
    assert lines[0].startswith("Program: ")
    assert lines[-1] == (
        "  Costs: estimated by FLOPs. A run measures its stages and may choose another."
    )
    assert layout.config.parallel.schedule == "csv"
    assert layout.config.parallel.schedule_file == str(tmp_path / "schedule.csv")
    text = (tmp_path / "schedule.csv").read_text(encoding="utf-8")
    assert layout.program.compute == from_csv(text)
    costs = stage_costs(layout)
    plain = simulate(layout_of(load(tmp_path)).program.compute, costs)
    assert simulate(layout.program.compute, costs).makespan < plain.makespan


def test_the_program_of_a_run_is_taken_before_a_search(tmp_path: Path) -> None:
    config, run = load(tmp_path, AUTO), tmp_path / "run"
    run.mkdir()
    found, _ = plan_layout(config, run)
    layout, lines = plan_layout(config, tmp_path)
    assert lines == [f"Program: that of {run}/schedule.csv"]
    assert layout.program.compute == found.program.compute
    assert layout.config.parallel.schedule == "auto"
    assert not (tmp_path / "schedule.csv").exists()


def test_a_program_that_does_not_fit_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    """As in an equivalence check, whose layout may be smaller than the run's."""
    run = tmp_path / "run"
    run.mkdir()
    plan_layout(load(tmp_path, AUTO), run)
    _, lines = plan_layout(load(tmp_path, AUTO, "--parallel.data=2"), tmp_path)
    assert lines[0].startswith(
        f"Not the program of {run}/schedule.csv, which does not fit here: {run}/schedule"
        ".csv: the program has 8 microbatches, and the config has 4 "
    )
    assert lines[1].startswith("Program: ")


def test_a_memory_limit_holds_by_estimated_activations(tmp_path: Path) -> None:
    words = ("--parallel.schedule=gpipe", "--parallel.activation_limit=2 MB")
    with pytest.raises(ScheduleError, match=r'"gpipe" has activations of [\d.]+ MiB live'):
        plan_layout(load(tmp_path, *words), tmp_path)
    plan_layout(load(tmp_path, *words[:1], "--parallel.activation_limit=20 MB"), tmp_path)


def test_times_are_those_of_a_file_or_estimates(tmp_path: Path) -> None:
    layout = layout_of(load(tmp_path))
    estimated = estimated_times(layout, None)
    assert estimated.source == "estimated by FLOPs"
    assert estimated.costs == stage_costs(layout)
    file = tmp_path / "costs.toml"
    file.write_text("forward = [1, 2]\nbackward_input = 3\nbackward_weight = 4\n")
    read = estimated_times(layout, str(file))
    assert (read.unit, read.source) == ("s", f"from {file}")
    assert read.costs == Costs([1, 2], [3, 3], [4, 4])


def test_given_times_are_what_auto_is_searched_with(tmp_path: Path) -> None:
    times = EstimatedTimes(Costs(1.0, 1.0, 1.0), "unit", "{:.1f} units".format, "from the test")
    _, lines = plan_layout(load(tmp_path, AUTO), tmp_path, times)
    assert "25.0 units per step" in lines[0], "8 microbatches of 3 units, and one forward"
    assert lines[-1].startswith("  Costs: from the test.")
