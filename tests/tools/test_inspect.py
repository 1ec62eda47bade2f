"""`megapipe inspect`: the summary, the verdict, the exit status."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megapipe.errors import CheckpointError, UsageError
from megapipe.tools.cli import main
from megapipe.tools.inspect import run
from tests.checkpoint.samples import edit_manifest, save_sample

SHARD = "shard-00000-of-00001.safetensors"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)


def test_a_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_sample(tmp_path, 1200)
    assert run([str(path), "--tensors"]) == 0
    out = capsys.readouterr().out
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert str(path) in lines
    for line in (
        "step 1,200",
        "tokens 1,200,000",
        "data streams 1",
        "model num_layers 2, hidden_size 8",
        "bfloat16 0 values",
        "float32 24 values",
        "files 1 shard, config.toml, tokenizer.model",
        "whole yes, every byte verified",
        "│ float32/layers.2.weight │ float32 │ [4, 6] │ 1 │",
    ):
        assert line in lines, out


def test_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_sample(tmp_path, 3)
    flip(path / SHARD)
    assert run([str(path)]) == 1
    out = capsys.readouterr().out
    assert "whole" in out
    assert "NO" in out
    assert f"{path / SHARD} is damaged: bytes " in out
    assert run([str(path), "--no-verify"]) == 0
    assert "sizes agree, bytes not read" in capsys.readouterr().out
    (path / SHARD).unlink()
    assert run([str(path), "--no-verify"]) == 1
    assert f"{path / SHARD} is missing" in capsys.readouterr().out


def test_a_damaged_config_is_named_and_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_sample(tmp_path, 3)
    (path / "config.toml").write_text("[model]\nnum_layers = 99\n")
    assert run([str(path)]) == 1
    out = capsys.readouterr().out
    assert "config.toml has 24 bytes, its manifest says" in out
    assert "num_layers" not in out


@pytest.mark.parametrize("below", ["checkpoints", "."])
def test_a_run_lists_its_checkpoints(
    below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / below
    for step in (1, 2, 3):
        save_sample(root, step)
    assert run([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("yes, every byte verified") == 3
    flip(root / "step-00000002" / SHARD)
    (root / "step-00000003" / "manifest.json").write_bytes(b"{}")
    assert run([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines() if line.startswith("│")]
    assert [row.split(" │ ")[0] for row in rows] == ["│ 3", "│ 2", "│ 1"]
    assert ["DAMAGED" in row for row in rows] == [True, True, False]
    assert "manifest.json is damaged" in out
    assert f"step-00000002/{SHARD} is damaged" in out


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone is not a checkpoint: it is not there"):
        run([str(tmp_path / "gone")])
    with pytest.raises(CheckpointError, match=r"it holds no manifest\.json and no checkpoints"):
        run([str(tmp_path)])


def test_tensors_are_those_of_one_checkpoint(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    with pytest.raises(UsageError, match=rf"--tensors is for single checkpoints, .*{path}\.$"):
        run([str(tmp_path), "--tensors"])


def test_json_to_a_file_or_in_place_of_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = save_sample(tmp_path, 3), tmp_path / "it.json"
    assert run([str(path), "--tensors", "--json", str(file)]) == 0
    assert "whole" in capsys.readouterr().out
    assert run([str(path), "--tensors", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())
    assert run(["--diff", str(path), str(path), "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["differs"] is False


@pytest.mark.parametrize("words", [[], ["a", "--diff", "b", "c"], ["--diff", "b", "c", "--stats"]])
def test_one_directory_or_two(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^(Name a directory, or two|--diff lists the tensors)"):
        run(words)


def test_hostile_state_is_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_sample(tmp_path, 3)
    hostile = {"tokens": "\x1b[2J[red]", "[bold]": "[/]", "\x1b[2J": 1}
    edit_manifest(path, lambda document: document.update(state=hostile))
    assert run([str(path)]) == 0
    assert run([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[red]" in out
    assert "[bold]" in out


def test_needs_no_torch() -> None:
    code = "import sys, megapipe.tools.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.touch(), "it is a file"),
        (lambda path: path.mkdir(), "it holds no manifest.json"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "nothing was saved yet"),
        (lambda path: path.symlink_to("gone"), "is a symbolic link to gone, which is not there"),
        (lambda path: (path / "Step-00000003").mkdir(parents=True), "rename it to step-00000003"),
        (lambda path: path.symlink_to("x" * 300), "it can't be read: File name too long."),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_what_is_no_checkpoint_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    make: Callable[[Path], None],
    said: str,
) -> None:
    make(tmp_path / "it")
    assert main([command, str(tmp_path / "it")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megapipe: ")
    assert said in line
