"""Words of the command line that several commands understand."""

import argparse
import importlib
import os
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from megapipe.errors import UsageError
from megapipe.tools.arguments import (
    Parser,
    check_output,
    path_argument,
    text_argument,
)
from megapipe.tools.bench import BENCHES
from megapipe.tools.cli import COMMANDS, main
from megapipe.tools.data import ACTIONS


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
        ["bench"],
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


WRONG_OPTIONS = {
    "train a.toml --dry-runn": "did you mean --dry-run?",
    "train --micro-batch-sise=5": "did you mean --train.micro_batch_size?",
    "verify --stpes 3": "did you mean --steps?",
    "plan --csots 1,1,1": "did you mean --costs?",
    "tokenizer --txt": "type `megapipe tokenizer --help`.",
    "tokenizer train x --vocab-sizes 300": "did you mean --vocab-size?",
    "tokenizer inspect x --txt hello": "did you mean --text?",
    "convert a.toml --proof-layer 2": "did you mean --proof-layers?",
    "export run --ot x": "did you mean --out?",
    "merge run --lst 3": "did you mean --last?",
    "inspect --no-verfy": "did you mean --no-verify?",
    "generate run --promt hello": "did you mean --prompt?",
    "bench gpu --minuts 3": "did you mean --minutes?",
    "bench kernels --rooflin": "did you mean --roofline?",
    "bench pipeline --jsno x": "did you mean --json?",
    "bench train --repeat=3": "did you mean --repeats?",
    "data audit a.toml --wokers 2": "did you mean --workers?",
    "data look a.toml --stpe 2": "did you mean --step?",
    "data trace run --stpes 2": "did you mean --steps?",
    "schema --out x": "type `megapipe schema --help`.",
}
GROUPS = {"bench": BENCHES, "data": ACTIONS}
OPERANDS = ("a.toml", "run", "x")


@pytest.mark.parametrize(("line", "advice"), WRONG_OPTIONS.items())
def test_a_wrong_option_of_any_command_names_the_nearest(
    line: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where what the command needs is missing, or a value of the option follows."""
    words = line.split()
    wrong = next(word for word in words if word.startswith("--"))
    command = " ".join(word for word in words[: words.index(wrong)] if word not in OPERANDS)
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"megapipe: {wrong} is not an option of `megapipe {command}`; {advice}\n"


def test_a_wrong_option_of_every_command_is_tried() -> None:
    tried = {line.split()[0] for line in WRONG_OPTIONS}
    assert tried == set(COMMANDS)
    for group, members in GROUPS.items():
        named = {line.split()[1] for line in WRONG_OPTIONS if line.startswith(f"{group} ")}
        assert named == set(members)


@pytest.mark.parametrize(
    "line",
    [
        "tokenizer inspect x",
        "inspect x",
        "generate x",
        "schema",
        "bench gpu",
        "bench kernels",
        "bench pipeline",
        "bench train",
    ],
)
def test_a_key_of_a_config_is_refused_where_there_is_no_config(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rather than dropped."""
    assert main([*line.split(), "--model.num_layers=3"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("megapipe: --model.num_layers=3 is not an option of `megapipe ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tarin", "'tarin' is not a command; did you mean `megapipe train`?"),
        ("bench pipelin", "'pipelin' is not a bench; did you mean `megapipe bench pipeline`?"),
        (
            "tokenizer trian x",
            "'trian' is not a subcommand; did you mean `megapipe tokenizer train`?",
        ),
        ("tokenizer x", "'x' is not a subcommand; see `megapipe tokenizer --help`."),
    ],
)
def test_a_wrong_command_names_the_nearest(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 1
    assert capsys.readouterr().err.startswith(f"megapipe: {said} There are ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "--verison",
            "--verison is not an option of `megapipe`; did you mean `megapipe --ver",
        ),
        (
            "bench --hlep",
            "--hlep is not an option of `megapipe bench`; did you mean `megapipe b",
        ),
        (
            "bench --jsno x",
            "--jsno is not an option of `megapipe bench`; see `megapipe bench --h",
        ),
        ("verify a.toml --steps many", "--steps many must be a whole number."),
        ("generate x --temperature hot", "--temperature hot must be a number."),
        ("generate x --device tpu", "--device tpu is not one of cpu, cuda."),
        ("bench train --json", "--json needs a value. Type `megapipe bench train --help`."),
    ],
)
def test_wrong_options_and_values_have_one_form(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 1
    assert capsys.readouterr().err.startswith(f"megapipe: {said}")


class ParserFound(Exception):
    """Ends a command that has made its parser."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


def parsers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Parser]:
    """Those of all commands, benches and subcommands."""

    def found(parser: Parser, argv: Sequence[str]) -> NoReturn:
        raise ParserFound(parser)

    commands = [name for name in COMMANDS if name not in GROUPS]
    members = [f"{group}.{name}" for group, names in GROUPS.items() for name in names]
    for name in (*commands, *members):
        module = importlib.import_module(f"megapipe.tools.{name}")
        with monkeypatch.context() as patch:
            patch.setattr(Parser, "parse", found)
            with pytest.raises(ParserFound) as caught:
                module.run([])
        yield caught.value.parser
        for action in caught.value.parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def test_every_option_of_every_command_is_found_by_a_name_that_is_nearly_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = set()
    for parser in parsers(monkeypatch):
        command = parser.prog.split()[1:]
        for option in set(parser._option_string_actions) - {"-h", "--help"}:
            wrong = f"{option}x"
            assert main([*command, wrong]) == 1
            said = capsys.readouterr()
            assert (said.out, said.err) == (
                "",
                f"megapipe: {wrong} is not an option of `{parser.prog}`; did you mean {option}?\n",
            )
            tried.add(command[0])
    assert tried == set(COMMANDS) - {"schema"}, "schema has no options"


def test_words_after_two_dashes_are_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "train", "--", "--txt"]) == 1
    missing = "megapipe: the following arguments are required: --vocab-size, --out."
    assert capsys.readouterr().err.startswith(missing)
