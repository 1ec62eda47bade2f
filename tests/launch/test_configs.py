"""The configs that ship: what their comments say holds."""

import re
import tomllib
from pathlib import Path

import pytest

from megapipe.config import Config, load_config
from megapipe.layout.world import resolve_axes, usable_world_sizes
from megapipe.models.families import FAMILIES
from megapipe.plan.dry_run import dry_run
from megapipe.tools.cli import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.toml"))
GPUS_PER_NODE = 8


def commands(path: Path) -> list[str]:
    """Indented lines of the comment at the top."""
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    return re.findall(r"^#     (\S.*)$", head, re.MULTILINE)


def world_sizes(path: Path) -> set[int]:
    """The numbers of processes that the comment's commands start."""
    sizes = set()
    for command in commands(path):
        if nodes := re.search(r"sbatch --nodes (\d+)", command):
            sizes.add(int(nodes[1]) * GPUS_PER_NODE)
        elif size := re.search(r"(?:--world-size |NPROC_PER_NODE=)(\d+)", command):
            sizes.add(int(size[1]))
        else:
            sizes.add(resolve_axes(load(path)).world_size)
    return sizes


def load(path: Path) -> Config:
    return load_config(path, [], FAMILIES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_in_the_comment_would_start(path: Path) -> None:
    assert commands(path), "a config says how to run it"
    for command in commands(path):
        assert f"launch/configs/{path.name}" in command
        for file in re.findall(r"launch/[\w./-]+", command):
            assert (ROOT / file).is_file(), file
    for size in world_sizes(path):
        config = load(path)
        shown = dry_run(config, FAMILIES[config.model.family], path.name, size)
        assert f"Layout: {size:,} rank" in shown


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_names_and_habits(path: Path) -> None:
    config = load(path)
    tree = tomllib.loads(path.read_text(encoding="utf-8"))
    assert Path(config.train.run_dir).parts[0] == "runs", "git ignores only runs/"
    assert "preset" in tree["model"]
    if config.train.device == "cuda":
        assert config.train.precision == "bf16"
        assert config.parallel.tensor <= GPUS_PER_NODE, "tensor ranks stay inside a node"


def test_llama3_70b_runs_on_any_multiple_of_64_gpus() -> None:
    (path,) = (path for path in CONFIGS if path.stem == "llama3-70b")
    sizes = usable_world_sizes(load(path))
    assert sizes == [64 * replicas for replicas in (1, 2, 4, 8, 16, 32, 64)]


def test_readme_lists_them_all() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in CONFIGS:
        (row,) = re.findall(
            rf"^\| \[`{path.name}`\]\(launch/configs/{path.name}\).*$", readme, re.M
        )
        for size in world_sizes(path):
            assert re.search(rf"\b{size:,}\b", row), (path.name, size)


def test_the_command_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "launch" / "configs" / "llama3-8b-2nodes.toml"
    assert main(["train", str(path), "--dry-run", "--world-size", "16"]) == 0
    assert "Layout: 16 ranks = pipeline 2 * data 2 * tensor 4" in capsys.readouterr().out
