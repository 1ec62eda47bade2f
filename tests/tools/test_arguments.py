"""Words of the command line that several commands understand."""

import os
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from megapipe.tools.arguments import UsageError, check_output, path_argument, text_argument
from megapipe.tools.cli import main


def test_paths_mean_what_they_mean_in_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert path_argument("~/run") == Path("/home/me/run")
    assert path_argument("caf\udce9") == Path("caf\udce9")
    with pytest.raises(UsageError, match=r"\$NOWHERE/run names the variable NOWHERE"):
        path_argument("$NOWHERE/run")


def test_text_has_to_be_utf_8() -> None:
    assert text_argument("café") == "café"
    with pytest.raises(ArgumentTypeError, match="not UTF-8 text: character 4 is byte 0xe9"):
        text_argument("caf\udce9")


def test_an_output_that_can_be_written(tmp_path: Path) -> None:
    check_output("--out", tmp_path / "new.png")
    check_output("--out", tmp_path / "not" / "there" / "new.png")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    check_output("--out", tmp_path / "link")
    (tmp_path / "old.png").touch()
    check_output("--out", tmp_path / "old.png")


def test_an_output_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "none" / "target")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, said in (
        (tmp_path, "is a directory"),
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path / "file" / "new.png", "file is not a directory"),
        (tmp_path / ("x" * 300), "a name of 300 bytes is too long"),
        (tmp_path / "link", "it is a link to .*/none/target, and there is no directory"),
        (tmp_path / "loop", "it is a link to itself"),
        (tmp_path / "/".join(["x" * 200] * 21), r"a path of 4\d\d\d bytes is too long"),
    ):
        with pytest.raises(UsageError, match=said):
            check_output("--out", path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="no permission to write"):
        check_output("--out", tmp_path / "new.png")


@pytest.mark.parametrize(
    "words",
    [
        ["inspect"],
        ["inspect", "a", "b"],
        ["inspect", "a", "--no-such-option"],
        ["tokenizer"],
        ["tokenizer", "train"],
        ["tokenizer", "inspect", "a", "--no-such-option"],
        ["generate"],
        ["plan"],
        ["verify", "a.toml", "--steps", "many"],
        ["bench", "train", "--json"],
        ["bench", "pipeline", "--no-such-option"],
        ["bench", "train", "--json", "/dev/null/x"],
        ["tokenizer", "train", "x", "--vocab-size", "300", "--out", "/dev/null/x.model"],
    ],
)
def test_every_command_complains_in_one_way(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("megapipe: ")
    assert len(said.err.splitlines()) == 1
