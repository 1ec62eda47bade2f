"""`megapipe plan`: figures that are known, what is left out and why, pictures, and no torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megapipe.pipeline.schedule import SCHEDULES, build_program, to_csv
from megapipe.tools.cli import main
from tests.config.examples import TEXT, write

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
FOUR = ("--parallel.pipeline=4", "--parallel.tensor=1", "--columns=100")


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def lines(text: str) -> dict[str, list[str]]:
    """The last table: schedule -> cells."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in rows if len(cells) == 8}


def test_all_schedules_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With equal costs their bubbles and peaks are those of the papers (p = 4, m = 8)."""
    shown = plan(capsys, str(write(tmp_path)), *FOUR, "--schedule=all", "--costs=1,1,1")
    table = lines(shown)
    assert table.keys() == SCHEDULES.keys()
    assert {name: cells[2] for name, cells in table.items()} == {
        "gpipe": "37.5%",
        "1f1b": "37.5%",
        "interleaved-1f1b": "18.8%",
        "zb-h1": "12.5%",
        "zb-h2": "12.5%",
        "zb-v": "6.2%",
        "dualpipe-v": "6.2%",
        "v-half": "18.8%",
        "v-min": "22.9%",
    }
    live = {name: float(cells[3]) for name, cells in table.items()}
    assert (live["gpipe"], live["1f1b"], live["interleaved-1f1b"]) == (8, 4, 5.5)
    assert (live["zb-h1"], live["zb-h2"], live["zb-v"], live["v-half"]) == (4, 7, 4, 3)
    assert {name: cells[0] for name, cells in table.items()}["zb-v"] == "2"
    times = [float(cells[1]) for cells in table.values()]
    assert times == sorted(times, reverse=True), "the slowest first"
    assert table["1f1b"][1] == "33.0"
    # A rank in the middle sends each microbatch forward and back, [64, 2, 64] in bf16.
    assert table["1f1b"][6] == "16 x 16 KiB"
    assert table["zb-v"][6] == "32 x 16 KiB"
    assert (table["1f1b"][5], table["zb-h1"][5]) == ("-", "4")


def test_one_schedule_with_its_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, str(write(tmp_path)), *FOUR, "--costs=1,1,1")
    assert "Schedule: 1f1b, 4 stages, 8 microbatches of 2 sequences per replica and step\n" in shown
    assert "\nrank 0  F0F1F2F3............B0--F4B1--F5B2--F6B3--F7B4--..B5--..B6--..B7--\n" in shown
    ranks = re.findall(r"│ (\d) +│ +(\d) │ +([\d.]+)% │ +(\d) │", shown)
    assert ranks == [(f"{rank}", f"{rank}", "37.5", f"{4 - rank}") for rank in range(4)]
    assert list(lines(shown)) == ["1f1b"]


def test_the_ranks_that_the_step_is_as_long_as(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks, the second twice as slow: its eight microbatches, and one of the first."""
    file = tmp_path / "costs.toml"
    file.write_text(
        "forward = [1, 2]\nbackward_input = [1, 2]\nbackward_weight = [1, 2]\nlatency = 0.5"
    )
    words = [str(write(tmp_path)), "--parallel.schedule=auto", f"--parallel.stage_costs={file}"]
    shown = plan(capsys, *words, "--schedule=1f1b", "--columns=300")
    assert float(lines(shown)["1f1b"][1]) == 48 + 3 + 1
    assert (
        "\nCritical path: rank 1 92% (F 31%, B 62%), rank 0 6% (F 2%, B 4%), transfers 2%. Only "
    ) in shown


def test_costs_of_the_stages_are_those_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A heavy output layer is in the plan."""
    words = (str(write(tmp_path)), *FOUR)
    light, heavy = (
        float(lines(plan(capsys, *words, f"--model.vocab_size={size}"))["1f1b"][2].strip("%"))
        for size in (64, 100_000)
    )
    assert 37.5 < light < 40
    assert heavy > 200


def test_what_does_not_fit_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TEXT.replace("pipeline = 2", "pipeline = 8\nlayers_per_stage = [1,1,1,1,1,1,1,1]")
    shown = plan(capsys, str(write(tmp_path, text)), "--schedule=all", "--columns=300")
    assert set(lines(shown)) == {"gpipe", "1f1b", "zb-h1", "zb-h2"}
    assert (
        "zb-v is left out: parallel.virtual = 2 is too large: parallel.pipeline 8 * "
        "parallel.virtual 2 = 16 stages need at least 16 layers, and model.num_layers = 8."
    ) in shown
    few = (str(write(tmp_path)), *FOUR, "--train.global_batch_size=8", "--schedule=dualpipe-v,1f1b")
    shown = plan(capsys, *few, "--columns=300")
    assert set(lines(shown)) == {"1f1b"}
    assert 'dualpipe-v is left out: parallel.schedule = "dualpipe-v" needs 8 microbatches' in shown
    uneven = (str(write(tmp_path)), "--parallel.layers_per_stage=[3,5]", "--columns=300")
    assert "Schedule: gpipe, 2 stages" in plan(capsys, *uneven, "--schedule=gpipe")
    shown = plan(capsys, *uneven, "--schedule=1f1b,zb-v")
    assert "zb-v: layers are balanced, as parallel.layers_per_stage is for others." in shown


def test_auto_is_searched_for_with_the_costs_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With equal costs 1F1B's memory is enough for a split backward: ZB-H1's 27 units, or fewer."""
    words = [str(write(tmp_path)), *FOUR, f"--train.run_dir={tmp_path}"]
    shown = plan(capsys, *words, "--parallel.schedule=auto", "--costs=1,1,1")
    assert "Schedule: auto, 4 stages, 8 microbatches" in shown
    assert re.search(r"\nProgram: .*: 27 units per step", shown)
    assert "\n  Costs: from --costs. A run measures its stages and may choose another." in shown
    assert lines(shown)["auto"][:4] == ["1", "27.0", "12.5%", "4"]
    shown = plan(capsys, *words, "--parallel.schedule=auto")
    assert "\n  Costs: estimated by FLOPs. A run measures" in shown
    shown = plan(capsys, *words, "--schedule=1f1b, auto", "--costs=1,1,1", "--columns=300")
    assert list(lines(shown)) == ["1f1b", "auto"]
    assert re.search(r"\nauto: .*: 27 units per step by simulation", shown)
    assert not (tmp_path / "schedule.csv").exists(), "a plan writes nothing"


def test_auto_is_the_program_of_the_run_where_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = to_csv(build_program("1f1b", pipeline=4, virtual=1, microbatches=8))
    (tmp_path / "schedule.csv").write_text(program, encoding="utf-8")
    words = [str(write(tmp_path)), *FOUR, f"--train.run_dir={tmp_path}", "--columns=300"]
    shown = plan(capsys, *words, "--schedule=auto", "--costs=1,1,1")
    assert f"\nProgram: that of {tmp_path}/schedule.csv\n" in shown
    assert lines(shown)["auto"][1] == "33.0"
    shown = plan(capsys, *words, "--schedule=auto", "--costs=1,1,1", "--train.global_batch_size=12")
    assert "Program: that of" not in shown


def test_all_has_auto_where_the_config_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(write(tmp_path)), *FOUR, "--schedule=all", f"--train.run_dir={tmp_path}"]
    assert lines(plan(capsys, *words)).keys() == SCHEDULES.keys()
    shown = plan(capsys, *words, "--parallel.schedule=auto")
    assert lines(shown).keys() == {*SCHEDULES, "auto"}
    assert lines(plan(capsys, *words[:-2], "--schedule=all,auto")).keys() == {*SCHEDULES, "auto"}


def test_times_of_a_file_are_those_of_all_schedules_with_its_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "costs.toml"
    file.write_text("forward = [1, 1, 1, 2]\nbackward_input = 1\nbackward_weight = 1")
    words = [str(write(tmp_path)), *FOUR, f"--train.run_dir={tmp_path}", "--columns=300"]
    words += ["--parallel.schedule=auto", f"--parallel.stage_costs={file}"]
    shown = plan(capsys, *words, "--schedule=1f1b,zb-v,auto")
    assert f"Costs: from {file}. Time: s." in shown
    assert list(lines(shown)) == ["1f1b", "auto"]
    assert float(lines(shown)["1f1b"][1]) == 41, "eight microbatches on the last rank, and 9"
    assert (
        f'zb-v is left out: parallel.stage_costs = "{file}" has the times of 4 stages, and zb-v '
        "has 8: compare it with --costs F,I,W, or with --parallel.stage_costs none."
    ) in shown
    assert list(lines(plan(capsys, *words, "--schedule=zb-v", "--costs=1,1,1"))) == ["zb-v"]


def test_a_limit_of_memory_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the activations that the plan itself shows."""
    words = [str(write(tmp_path)), *FOUR, "--columns=300", "--schedule=gpipe,1f1b"]
    assert {name: cells[4] for name, cells in lines(plan(capsys, *words)).items()} == {
        "gpipe": "6 MiB",
        "1f1b": "2.38 MiB",
    }
    shown = plan(capsys, *words, "--parallel.activation_limit=2.5 MiB")
    assert set(lines(shown)) == {"1f1b"}
    assert "gpipe is left out: the program of" in shown
    assert main(["plan", *words[:-1], "--parallel.activation_limit=10 KiB"]) == 1
    assert "is below what any schedule needs" in capsys.readouterr().err


def test_a_picture_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.png"
    words = (str(write(tmp_path)), *FOUR, "--costs=1,1,1", f"--out={path}")
    shown = plan(capsys, *words, "--schedule=1f1b,zb-v")
    assert shown.endswith(f"Picture: {path}\n")
    two = Image.open(path)
    plan(capsys, *words)
    one = Image.open(path)
    assert two.width == one.width
    assert two.height > 1.6 * one.height


def test_a_trillion_parameters_without_torch() -> None:
    program = (
        "import sys; from megapipe.tools.cli import main; "
        f"status = main(['plan', {str(CONFIGS / 'megatron-1t.toml')!r}, '--world-size=3072']); "
        "heavy = {'torch', 'numpy', 'matplotlib'} & set(sys.modules); "
        "sys.exit(status or str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "interleaved-1f1b, 128 stages, 512 microbatches" in done.stdout
    (cells,) = lines(done.stdout).values()
    assert cells[3] == "95.5", "p + (p - 1) / v microbatches"
    assert len(done.stdout.splitlines()) < 60


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--schedule=zbv"], "'zbv' is not a schedule. There are 1f1b,"),
        (["--costs=1,2"], "--costs 1,2 must be three numbers, as in 1,1,1"),
        (["--costs=1,0,1"], "--costs 1,0,1 must be more than 0 each"),
        (["--out=plan.svg"], "--out plan.svg must end in .png"),
        (["--out=none/plan.png"], "--out none/plan.png: there is no directory none"),
        (["--columns=10"], "--columns 10 must be 40 or more"),
        (["--world-size=0"], "--world-size 0 must be 1 or more"),
        (["--world-size=3"], "World sizes that work with this config: 4, 8, 16, 32"),
        (["--schedule=zb-v", "--parallel.pipeline=8"], "16 stages need at least 16 layers"),
        (["--schedule=zb-v,v-min", "--parallel.pipeline=8"], "no schedule fits this layout"),
    ],
)
def test_wrong_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["plan", str(write(tmp_path)), *words]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("megapipe: ")
    assert said in shown
