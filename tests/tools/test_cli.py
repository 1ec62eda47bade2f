"""The command line as a user meets it, without a training run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megapipe import __version__
from megapipe.config import section_types
from megapipe.errors import ConfigError, MegapipeError
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.presets import PRESETS
from megapipe.pipeline.schedule import SCHEDULES
from megapipe.tools import cli
from megapipe.tools.arguments import config_keys, split_overrides
from tests.config.examples import TEXT, write

HEAVY = {"torch", "numpy", "datasets", "wandb", "triton", "transformers", "rich", "safetensors"}


def heavy_imports(*words: str) -> set[str]:
    """Which heavy packages a command imports."""
    program = (
        "import sys; from megapipe.tools.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()) & (HEAVY | {"pydantic"})


def test_every_listed_command_exists_and_is_listed_in_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, summary in cli.COMMANDS.items():
        assert importlib.util.find_spec(f"megapipe.tools.{name}") is not None, name
        assert summary in shown


def test_help_imports_nothing_heavy() -> None:
    assert heavy_imports("--help") == set()
    assert heavy_imports("train", "--help") <= {"pydantic"}
    assert heavy_imports("schema") <= {"pydantic"}
    assert heavy_imports("train", "no-such-file.toml") <= {"pydantic"}


def test_train_help_lists_every_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    flat = " ".join(shown.split())
    for section, kind in section_types(GPTConfig).items():
        assert f"[{section}]" in shown
        for key, field in kind.model_fields.items():
            assert f"--{section}.{key} " in shown
            assert " ".join((field.description or "").split()) in flat
    assert f"--parallel.schedule {'|'.join(SCHEDULES)}|" in flat
    assert "--parallel.layers_per_stage [INTEGER, ...]|none" in shown
    assert "--data.sources.0.path TEXT" in shown
    assert "--model.rope_scaling.factor NUMBER" in shown
    assert "Optimizer steps in the whole run, restarts included. (required)" in flat
    assert "--train.seed INTEGER Fixes initial weights, data order and dropout, in every" in flat
    assert "in every layout alike. [1234]" in flat
    assert all(preset in flat for preset in PRESETS)
    assert max(map(len, shown.splitlines())) <= 100


def test_version_and_module_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megapipe", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"megapipe {__version__}\n"


@pytest.mark.parametrize(
    ("umask", "settled"), [(0o022, 0o022), (0o777, 0o077), (0o277, 0o077), (0, 0)]
)
def test_a_umask_takes_no_rights_from_the_owner(umask: int, settled: int) -> None:
    before = os.umask(umask)
    try:
        assert cli.main(["--version"]) == 0
    finally:
        found = os.umask(before)
    assert found == settled


def test_commands_that_move_weights_ask_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.HUGE_PAGES, "0")
    cli.main(["merge"])
    assert os.environ[cli.HUGE_PAGES] == "0", "the user's"
    monkeypatch.delenv(cli.HUGE_PAGES)
    cli.main(["inspect"])
    assert cli.HUGE_PAGES not in os.environ
    cli.main(["merge"])
    assert os.environ[cli.HUGE_PAGES] == "1"


@pytest.mark.parametrize("set_by_user", [None, *cli.ALLOCATOR_VARIABLES])
def test_the_allocator_grows_its_blocks_unless_the_user_has_set_it(
    set_by_user: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in cli.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if set_by_user:
        monkeypatch.setenv(set_by_user, "max_split_size_mb:512")
    before = {name: os.environ.get(name) for name in cli.ALLOCATOR_VARIABLES}
    assert cli.main(["--version"]) == 0
    after = {name: os.environ.get(name) for name in cli.ALLOCATOR_VARIABLES}
    changed = {} if set_by_user else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert after == before | changed


def test_unknown_command_names_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("megapipe: 'trian' is not a command; did you mean `megapipe train`?")


def test_errors_are_one_message_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, TEXT.replace("tensor = 2", "tensr = 2"))
    assert cli.main(["train", str(path), "--train.steps=0"]) == 1
    assert capsys.readouterr().err == (
        "megapipe: 2 problems with the config:\n"
        f"  {path}:10: parallel.tensr is not a key that exists; did you mean parallel.tensor?\n"
        "  command line: train.steps = 0 must be more than 0.\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: CONFIG.toml. Type `megapipe train --help`."),
        (["RUN", "--steps", "5"], "--steps is not an option of `megapipe train`; did you mean "),
        (["RUN", "--steps", "5"], "--train.steps?"),
        (["RUN", "--stepz=5"], "--stepz=5 is not an option of `megapipe train`; did you mean "),
        (["RUN", "--stepz=5"], "--train.steps?"),
        (["RUN", "--micro-batch-sise", "5"], "did you mean --train.micro_batch_size?"),
        (["RUN", "--halp"], "type `megapipe train --help`."),
        (["RUN", "--dryrun"], "did you mean --dry-run?"),
        (["RUN", "--world_size=2"], "did you mean --world-size?"),
        (["RUN", "more"], "'more' is one word too many"),
        (["RUN", "--world-size", "8"], "--world-size belongs to --dry-run"),
        (["RUN", "--dry-run", "--world-size", "0"], "--world-size 0 must be 1 or more"),
        (["RUN", "--dry-run", "--world-size", "x"], "--world-size x must be a whole number"),
        (["RUN", "--train.steps"], "--train.steps needs a value"),
        (["RUN", "--timeline"], "--timeline needs a value. Type `megapipe train --help`."),
    ],
)
def test_wrong_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    path = str(write(tmp_path))
    assert cli.main(["train", *(path if word == "RUN" else word for word in words)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("megapipe: ")
    assert said in shown


def test_overrides_are_set_apart_wherever_they_stand() -> None:
    words = ["--parallel.tensor", "4", "run.toml", "--x", "--a.b=1", "--dry-run", "--c.d", "-1"]
    assert split_overrides(words) == (
        ["run.toml", "--x", "--dry-run"],
        ["--parallel.tensor", "4", "--a.b=1", "--c.d", "-1"],
    )
    assert split_overrides(["--world-size=1.5"]) == (["--world-size=1.5"], [])


def test_interrupt_is_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_command", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "megapipe: interrupted\n"


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m megapipe schema | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("{", "")


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(section_types())


def test_render_shows_one_problem_in_one_line() -> None:
    assert cli.render(ConfigError(["a"])) == "megapipe: a"
    error = MegapipeError("b")
    assert cli.render(error) == "megapipe: b"
    error.add_note("in 1F0, action 3 of 40")
    assert cli.render(error) == "megapipe: b\n  in 1F0, action 3 of 40"
    assert len(config_keys()) == len(set(config_keys())) > 60


def run_failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> int:
    """A command that ends with this error."""

    def fail(argv: object) -> int:
        raise error

    monkeypatch.setattr("megapipe.tools.schema.run", fail)
    return cli.main(["schema"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), "megapipe: /a/b: Permission denied.\n"),
        (FileNotFoundError(2, "No usable temporary directory"), "megapipe: No usable temporary"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "megapipe: text that can't be"),
        (
            MemoryError(),
            "megapipe: out of memory. In a training, lower train.micro_batch_size, set",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    assert run_failing(monkeypatch, error) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(said)
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize("on", ["cpu", "gpu"])
def test_memory_that_torch_does_not_get_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on: str
) -> None:
    import torch

    if on == "gpu":
        error: Exception = torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. Of the "
            "allocated memory 70 GiB is by PyTorch."
        )
    else:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(10**15)
        error = caught.value
    assert run_failing(monkeypatch, error) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megapipe: out of memory (")
    assert "Of the" not in line
    for key in ("train.micro_batch_size", 'train.recompute = "full"', "[parallel]"):
        assert key in line


def test_a_fault_of_the_program_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_failing(monkeypatch, KeyError("of ours")) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "KeyError: 'of ours'" in shown
    assert shown.splitlines()[-1].startswith("megapipe: this is a fault of megapipe")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "WORD"],
        ["plan", "WORD"],
        ["verify", "WORD"],
        ["inspect", "WORD"],
        ["generate", "WORD"],
        ["tokenizer", "inspect", "WORD"],
        ["tokenizer", "train", "WORD", "--vocab-size", "400", "--out", "x.model"],
        ["tokenizer", "train", "x.txt", "--vocab-size", "400", "--out", "WORD"],
        ["tokenizer", "inspect", "${WORD}"],
        ["train", "x.toml", "WORD"],
        ["WORD"],
    ],
)
def test_a_line_break_in_a_word_breaks_no_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--out" in words and words[-1] == "WORD":
        Path("no\nsuch").mkdir()
        Path("x.txt").write_text("text\n")
    assert cli.main([word.replace("WORD", "no\nsuch") for word in words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megapipe: ")
    assert r"no\nsuch" in line
