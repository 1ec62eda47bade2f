"""Losses and gradient norms stay what they were when results.json was written, to 1e-12.

Bits depend on the CPU and on torch, so those of another machine differ by some 1e-15 in float64.
`python -m tests.golden` writes results.json anew.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.golden.runs import (
    CASES,
    CHECKPOINT,
    EXACT,
    RESULTS,
    RESUMED,
    ROUNDED,
    STEPS,
    Case,
    read_rows,
)

pytestmark = pytest.mark.timeout(900)  # for all runs together; 20 s where nothing else runs
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-12
LARGEST_CHECKPOINT = 100_000  # bytes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all cases have been trained, each under its name."""
    folder = tmp_path_factory.mktemp("golden")
    command = [sys.executable, "-m", "tests.golden.runs", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=850)
    return folder


def golden_rows(setting: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))[setting]
    return found


def differences(found: list[dict[str, Any]], golden: list[dict[str, Any]]) -> list[str]:
    """One line for each number that is not the golden one."""
    return [
        f"step {then['step']}, {name}: {then[name]!r} -> {now[name]!r}"
        for now, then in zip(found, golden, strict=True)
        for name in (*EXACT, *ROUNDED)
        if not (now[name] == then[name] or (name in ROUNDED and is_close(now[name], then[name])))
    ]


def is_close(now: float | None, then: float | None) -> bool:
    if now is None or then is None:
        return now is then
    return math.isclose(now, then, rel_tol=TOLERANCE, abs_tol=0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_logs_what_it_always_did(case: Case, runs: Path) -> None:
    found, golden = read_rows(runs / str(case)), golden_rows(case.setting)
    assert len(found) == len(golden), (runs / str(case) / "output.txt").read_text(encoding="utf-8")
    assert differences(found, golden) == []


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_a_difference_is_found(name: str) -> None:
    golden = golden_rows("llama")
    changed = [dict(row) for row in golden]
    value = changed[-1][name]
    if name == "batch_hash":
        changed[-1][name] = f"{int(value, 16) ^ 1:016x}"
    else:
        changed[-1][name] += 1 if name in EXACT else value * 2 * TOLERANCE
    assert differences(golden, golden) == []
    assert len(differences(changed, golden)) == 1
    assert f", {name}: " in differences(changed, golden)[0]


def contents(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds by its manifest: tensors, small files, fields of the state."""
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    tensors = {
        name: (entry["shape"], entry["dtype"]) for name, entry in manifest["tensors"].items()
    }
    return {"tensors": tensors, "files": set(manifest["files"]), "state": set(manifest["state"])}


def test_checkpoints_still_hold_the_same(runs: Path) -> None:
    (golden,) = CHECKPOINT.iterdir()
    saved = runs / str(RESUMED) / "run" / "checkpoints" / f"step-{STEPS:08d}"
    assert contents(saved) == contents(golden)


def test_the_golden_checkpoint_is_small_and_of_four_ranks() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST_CHECKPOINT
    assert len([path for path in files if path.suffix == ".safetensors"]) == 4
    (config,) = CHECKPOINT.rglob("config.toml")
    text = config.read_text(encoding="utf-8")
    assert all(f"\n{line}\n" in text for line in ("tensor = 2", "pipeline = 2", "virtual = 2"))
    assert '= "/' not in text, "no path of a machine"
