"""`megapipe bench gpu`: its parts run, end in time, are written down and told apart."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megapipe.errors import MegapipeError, UsageError
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.flops import gpt_flops_per_token
from megapipe.models.gpt.presets import PRESETS
from megapipe.tools.bench import gpu, run
from megapipe.tools.bench.gpu import KERNELS, TESTS, Part, parts
from megapipe.tools.bench.gpu_table import print_table
from megapipe.tools.bench.kernels import CASES

ROOT = Path(__file__).parents[2]
SLEEP = ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(600)")


@pytest.mark.timeout(1200)  # some ten processes that import torch
def test_the_whole_command_at_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to where a GPU would begin: tests are skipped, benches measure the CPU."""
    assert run(["gpu", "--toy", "--minutes=60", f"--out={tmp_path}"]) == 0
    names = ["tests", "kernels", "train-llama3-1b", "train-gpt2-124m", "kernels-more"]
    for name in names:
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert (report["part"], report["status"], report["ended"]) == (name, 0, "passed")
        assert report["packages"]["torch"]
        assert report["command"].startswith("python -m ")
        assert 0 < report["seconds"] < report["limit_seconds"]
        assert report["output"]
    kernels = json.loads((tmp_path / "kernels.figures.json").read_text())
    assert kernels["best"]["copied_bytes"] > 0
    assert {row["contender"] for row in kernels["results"]} == {
        *("megapipe in torch", "torch eager", "megapipe by addmm")
    }
    out = capsys.readouterr().out
    table = (tmp_path / "table.txt").read_text()
    assert table.strip() in out
    assert "of the ceiling" in table
    for words in ("skipped", "weight_grad", "tokens/s", "of the step", "rms_norm"):
        assert words in table


def test_parts_name_what_exists() -> None:
    assert sorted(KERNELS) == sorted(CASES)
    files = set((ROOT / "tests").rglob("test_*.py")) - {Path(__file__)}
    marked = {path for path in files if "pytest.mark.gpu" in path.read_text()}
    assert {ROOT / name for name in TESTS} == marked
    for toy in (True, False):
        given = parts(toy)
        assert sum(part.seconds for part in given) <= 60 * gpu.MINUTES
        assert [part.name for part in given] == [part.name for part in parts(not toy)]
        assert [part.spare for part in given] == [False] * 4 + [True]


def reports_of(
    given: list[Part], folder: Path, monkeypatch: pytest.MonkeyPatch, minutes: float = 9
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(gpu, "parts", lambda toy: given)
    status = run(["gpu", "--toy", f"--minutes={minutes}", f"--out={folder}"])
    files = (folder / f"{part.name}.json" for part in given)
    return status, {file.stem: json.loads(file.read_text()) for file in files}


def test_a_part_that_fails_or_takes_too_long_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        Part("fails", ("json.tool", "no such file"), 60, figures=False),
        Part("sleeps", SLEEP, 3, figures=False),
        Part("works", ("json.tool", "--help"), 60, figures=False),
    ]
    began = time.monotonic()
    status, reports = reports_of(given, tmp_path, monkeypatch)
    assert time.monotonic() - began < 200
    assert status == 1
    assert [report["ended"] for report in reports.values()] == [
        *("failed: status 2", "failed: out of time, 0 tests passed, 0 failed", "passed")
    ]
    assert "Failed: fails, sleeps;" in capsys.readouterr().out
    assert "no such file" in "".join(reports["fails"]["output"])


def test_no_part_goes_on_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [Part("first", SLEEP, 540, figures=False), Part("more", SLEEP, 60, spare=True)]
    status, reports = reports_of(given, tmp_path, monkeypatch, minutes=0.05)
    assert status == 1
    assert reports["first"]["ended"].startswith("failed: out of time")
    assert reports["more"]["ended"] == "cut off"
    assert reports["more"]["output"] == ["there was no time left"]


BENCH, CHECK = Part("a", (), 1), Part("a", (), 1, figures=False)
GOOD, BAD = "tests/a.py::b PASSED [ 10%]\n", "tests/a.py::c FAILED [ 20%]\n"


@pytest.mark.parametrize(
    ("status", "part", "figures", "output", "ended"),
    [
        (0, BENCH, None, "", "passed"),
        (1, BENCH, {"results": [1]}, "", "failed: status 1"),
        (None, BENCH, {"results": [1]}, "", "cut off"),
        (None, BENCH, {"results": []}, "", "failed: out of time"),
        (None, CHECK, None, GOOD + GOOD, "cut off: 2 tests passed, 0 failed"),
        (None, CHECK, None, GOOD + BAD, "failed: out of time, 1 tests passed, 1 failed"),
        (None, CHECK, None, "", "failed: out of time, 0 tests passed, 0 failed"),
    ],
)
def test_how_a_part_ended(
    status: int | None, part: Part, figures: dict[str, Any] | None, output: str, ended: str
) -> None:
    assert gpu._ended(status, part, figures, output) == ended


def test_shares_are_of_the_ceilings_of_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = {"copied_bytes": 4.0e12, "matmul_flops": 8.0e14}
    kernel = {
        "kernel": "weight_grad",
        "shape": {"model": "llama3-1b", "tensor": 1},
        "contender": "megapipe",
        "passes": "forward",
        "median_seconds": 250e-6,
        "share": 0.625,
        "problem": None,
    }
    broken = {**kernel, "contender": "megapipe by addmm", "problem": "RuntimeError: no"}
    theirs = {**kernel, "contender": "torch eager", "share": 0.111}
    flops = gpt_flops_per_token(GPTConfig(**PRESETS["llama3-1b"]), 4096)
    step = {
        "contender": "megapipe",
        "layout": "1 process",
        "median_tokens_per_second": 4.0e14 / flops,
        "mfu": 0.404,
        "peak_bytes": 60 << 30,
        "breakdown": [["gemm", 0.75, 12]],
    }
    options = {"preset": "llama3-1b", "sequence_length": 4096}
    figures = [
        {"bench": "kernels", "best": best, "results": [kernel, broken, theirs]},
        {"bench": "train", "options": options, "results": [step]},
        None,
    ]
    reports = [
        {"part": str(i), "ended": "passed", "seconds": 1.0, "output": [f"said {i}"], "figures": f}
        for i, f in enumerate(figures)
    ]
    assert print_table(reports, tmp_path) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("4e+03 GB/s", "800 TFLOP/s", "250.0 us", "62.5%", "no", "50.0%", "MFU 40.4%"):
        assert words in out
    assert "60.0 GiB" in out
    assert "12 calls" in out
    assert "said 2" in out
    assert "11.1%" not in out
    assert print_table([{**reports[2], "ended": "failed: status 1"}], tmp_path) == 1
    assert "no ceiling was measured" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_describe_gpu", lambda: None)
    assert run(["gpu", f"--out={tmp_path}"]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MegapipeError, match="--minutes 0 must be more than 0"):
        run(["gpu", "--minutes=0"])
    (tmp_path / "file").write_text("")
    with pytest.raises(MegapipeError, match=r"--out .*file/x can't be written: Not a directory"):
        run(["gpu", "--toy", f"--out={tmp_path}/file/x"])


def test_a_directory_for_results_is_a_path_as_in_a_config() -> None:
    with pytest.raises(UsageError, match="NOWHERE"):
        gpu.run(["--toy", "--minutes=0", "--out=$NOWHERE/figures"])
