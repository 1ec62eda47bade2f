"""The wheel: whole, without links, and at work in an environment where only it is megapipe."""

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from megapipe import __version__

ROOT = Path(__file__).parents[1]
FOLDERS = ("megapipe", "kernels", "models", "tools")
LINKED = ("kernels", "models", "tools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=unwanted)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment with the wheel; dependencies come from this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install"),
        *("--quiet", "--no-deps", "--no-index", wheel),
        cwd=home,
    )
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(*words: object, cwd: Path) -> str:
    """What the command prints; an AssertionError with all it said when it fails."""
    without_path = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=without_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def sources(folder: str) -> set[str]:
    """Python files of a root folder, links left out."""
    return {
        path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).rglob("*.py")
        if not any((ROOT / folder / name) in path.parents for name in LINKED)
    }


def test_linked_folders_are_real_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
        assert not any(stat.S_ISLNK(member.external_attr >> 16) for member in archive.infolist())
    expected = {f"megapipe/{name}" for name in sources("megapipe")}
    for folder in LINKED:
        expected |= {f"megapipe/{folder}/{name}" for name in sources(folder)}
    assert {"megapipe/kernels/__init__.py", "megapipe/models/gpt/model.py"} < expected
    assert modules == expected


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    assert f"\nVersion: {__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "\nRequires-Dist: torch" in text


CONFIG = """\
model = { preset = "llama-micro", vocab_size = 400 }
logging = { wandb = "off" }
train = { run_dir = "run", steps = 2, global_batch_size = 2, sequence_length = 16, \
precision = "fp32", device = "cpu" }
data = { tokenizer = "t.model", sources = [{ name = "text", path = "*.txt" }] }
"""


def test_the_installed_command_trains_from_an_empty_directory(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "text.txt").write_text(Path(json.decoder.__file__).read_text(), encoding="utf-8")
    words = ("tokenizer", "train", "text.txt", "--vocab-size", "400", "--out", "t.model")
    run(installed / "megapipe", *words, cwd=tmp_path)
    run(installed / "megapipe", "train", "run.toml", cwd=tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_the_installed_command_works_from_an_empty_directory(
    installed: Path, tmp_path: Path
) -> None:
    assert run(installed / "megapipe", "--version", cwd=tmp_path) == f"megapipe {__version__}\n"
    assert not list(tmp_path.iterdir())
    program = (
        "import megapipe.models.gpt.presets as m, megapipe as p; print(p.__file__, m.__file__)"
    )
    for file in run(installed / "python", "-c", program, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed.parent), file
    config = ROOT / "launch" / "configs" / "quickstart.toml"
    shown = run(installed / "megapipe", "train", config, "--dry-run", cwd=tmp_path)
    assert "Layout: 4 ranks = pipeline 2 * data 1 * tensor 2" in shown
    assert not list(tmp_path.iterdir())
