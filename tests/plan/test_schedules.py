"""Plans of schedules as objects: which are compared, what is changed for one, what each needs.

tests/tools/test_plan.py has what the command shows.
"""

from pathlib import Path

import pytest

from megapipe.config import Config, load_config
from megapipe.errors import ScheduleError, UsageError
from megapipe.layout.axes import Axes
from megapipe.layout.estimates import stage_activation_bytes
from megapipe.models.families import FAMILIES
from megapipe.pipeline.schedule import SCHEDULES, Costs
from megapipe.plan.program import EstimatedTimes
from megapipe.plan.schedules import Plan, amount, make_plan, schedule_names, size, with_schedule
from tests.config.examples import write
from tests.layouts import layout_of

FAMILY = FAMILIES["gpt"]
AXES = Axes.of(pipeline=4)
EQUAL = EstimatedTimes(Costs(1.0, 1.0, 1.0), "unit", "{:.1f} units".format, "from the test")
ALL = list(SCHEDULES)


def load(folder: Path, *words: str) -> Config:
    """Of 4 pipeline ranks and 8 microbatches."""
    layout = ("--parallel.pipeline=4", "--parallel.tensor=1", "--parallel.data=1")
    return load_config(write(folder), [*layout, *words], FAMILIES)


def planned(config: Config) -> Plan:
    return make_plan(config, AXES, FAMILY, EQUAL)


# --- Which schedules -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "own", "names"),
    [
        (None, "1f1b", ["1f1b"]),
        (None, "auto", ["auto"]),
        ("zb-v, 1f1b,zb-v", "gpipe", ["zb-v", "1f1b"]),
        ("all", "1f1b", ALL),
        ("all", "auto", [*ALL, "auto"]),
        ("1f1b,all", "gpipe", ["1f1b", *(name for name in ALL if name != "1f1b")]),
        ("auto", "1f1b", ["auto"]),
        ("csv", "csv", ["csv"]),
    ],
)
def test_names(wanted: str | None, own: str, names: list[str]) -> None:
    assert schedule_names(wanted, own) == names


@pytest.mark.parametrize("wanted", ["zbv", "1f1b,,gpipe", "csv"])
def test_what_is_no_schedule_is_refused(wanted: str) -> None:
    with pytest.raises(UsageError, match=r"is not a schedule\. There are 1f1b,"):
        schedule_names(wanted, "1f1b")


# --- The config for one --------------------------------------------------------------------------


def test_the_config_s_own_schedule_changes_nothing(tmp_path: Path) -> None:
    config = load(tmp_path, "--parallel.layers_per_stage=[1,2,3,2]")
    assert with_schedule(config, "1f1b") == (config, [])


def test_another_schedule_gets_chunks_that_it_can_have(tmp_path: Path) -> None:
    config = load(tmp_path)
    for name, virtual in (("gpipe", 1), ("interleaved-1f1b", 2), ("zb-v", 2), ("auto", 1)):
        changed, notes = with_schedule(config, name)
        assert (changed.parallel.schedule, changed.parallel.virtual) == (name, virtual)
        assert notes == []
    looped = load(tmp_path, "--parallel.schedule=interleaved-1f1b", "--parallel.virtual=2")
    assert with_schedule(looped, "zb-v")[0].parallel.virtual == 2
    assert with_schedule(looped, "1f1b")[0].parallel.virtual == 1


def test_layers_for_other_stages_are_balanced_anew_and_that_is_said(tmp_path: Path) -> None:
    config = load(tmp_path, "--parallel.layers_per_stage=[1,2,3,2]")
    assert with_schedule(config, "gpipe")[0].parallel.layers_per_stage == (1, 2, 3, 2)
    changed, notes = with_schedule(config, "zb-v")
    assert changed.parallel.layers_per_stage is None
    assert notes == [
        "zb-v: layers are balanced, as parallel.layers_per_stage is for others.",
    ]


def test_files_of_the_own_schedule_are_not_another_s(tmp_path: Path) -> None:
    words = ("--parallel.schedule=csv", "--parallel.schedule_file=program.csv")
    changed, _ = with_schedule(load(tmp_path, *words), "1f1b")
    assert changed.parallel.schedule_file is None
    words = ("--parallel.schedule=auto", "--parallel.stage_costs=costs.toml")
    changed, _ = with_schedule(load(tmp_path, *words), "1f1b")
    assert changed.parallel.stage_costs is None


# --- What each needs -----------------------------------------------------------------------------


def test_a_plan_by_hand(tmp_path: Path) -> None:
    """1F1B of 4 stages with 8 microbatches: rank r holds 4 - r of them at a time."""
    config = load(tmp_path, "--parallel.layers_per_stage=[2,2,2,2]")
    layout, found = layout_of(config), planned(config)
    assert found.timeline.makespan == (8 + 3) * 3
    assert found.live == [4, 3, 2, 1]
    held = [stage_activation_bytes(layout, stage) for stage in layout.stages]
    assert found.live_bytes == [n * each for n, each in zip(found.live, held, strict=True)]
    assert found.late == [0] * 4
    assert found.sent == [8, 16, 16, 8], "each microbatch forward, and its gradient back"
    assert found.layout == layout
    assert found.found == []
    assert found.title.startswith("1f1b: bubble 37.5%, at most 4 microbatches live on a rank (")


def test_neighbours_on_one_rank_send_nothing(tmp_path: Path) -> None:
    """In a V the last rank has the two stages in the middle, the first one both ends."""
    found = planned(load(tmp_path, "--parallel.schedule=zb-v", "--parallel.virtual=2"))
    assert found.sent == [16, 32, 32, 16]
    assert max(found.late) > 0


def test_a_limit_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="activations of 4 microbatches live"):
        planned(load(tmp_path, "--parallel.activation_limit=3"))


def test_auto_says_which_program_it_is(tmp_path: Path) -> None:
    words = ("--parallel.schedule=auto", f"--train.run_dir={tmp_path}/run")
    found = planned(load(tmp_path, *words))
    assert found.name == "auto"
    assert found.found[0].startswith("Program: ")
    assert found.timeline.makespan < planned(load(tmp_path)).timeline.makespan


# --- Numbers -------------------------------------------------------------------------------------


def test_sizes() -> None:
    assert [size(n) for n in (12, 2048, 1.5 * 2**20, 2**30 * 12.34)] == [
        "12 B",
        "2 KiB",
        "1.5 MiB",
        "12.3 GiB",
    ]


def test_amounts() -> None:
    assert [amount(time) for time in (2203.6, 33, 0.7611)] == ["2,203.6", "33.0", "0.761"]
