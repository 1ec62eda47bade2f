"""`megapipe data audit`: the command, what it keeps, and what the next start says."""

import json
import re
from pathlib import Path

import pytest

from megapipe.data.order.record import RECORD
from megapipe.errors import UsageError
from megapipe.tools.cli import main
from megapipe.tools.data import run
from tests.corpus import CONFIG, VOCABULARY
from tests.data.samples import jsonl, write


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    text = CONFIG.format(vocabulary=VOCABULARY, folder=tmp_path, steps=2)
    text = text.replace(f"{tmp_path}/tokenizer.model", f"{corpus}/tokenizer.model")
    text = text.replace(f"{tmp_path}/text/*.txt", f"{tmp_path}/text/*.jsonl")
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    write(tmp_path / "text" / "a.jsonl", jsonl(f"{n}: some words" for n in range(50)))
    return path


def test_an_audit_and_the_start_behind_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "audit", str(config), "--workers", "2", "--json", str(tmp_path / "out.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    kept = tmp_path / "run" / "data-audit.json"
    record = tmp_path / "run" / RECORD / "text.json"
    assert printed.endswith(f"Kept in {kept}\n")
    content = json.loads(kept.read_bytes())
    assert content == json.loads((tmp_path / "out.json").read_bytes())
    (source,) = content["sources"]
    assert re.search(rf"│ text +│ +1 │.*│ +50 │.*│ +{source['tokens']:,} │ 100.0% │", printed)
    before = record.read_bytes()

    assert main(["train", str(config)]) == 0
    assert (
        f"{source['tokens']:,} tokens in an epoch, counted by the audit" in capsys.readouterr().out
    )
    write(tmp_path / "text" / "b.jsonl", jsonl(["more"]))
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    assert main(["train", str(config)]) == 0
    assert '1 file of "text" is new, such as b.jsonl' in capsys.readouterr().out
    assert record.read_bytes() != before


def test_the_record_of_a_run_that_goes_on_is_its_own(config: Path, tmp_path: Path) -> None:
    assert main(["train", str(config)]) == 0
    record = tmp_path / "run" / RECORD / "text.json"
    before = record.read_bytes()
    write(tmp_path / "text" / "b.jsonl", jsonl(["more"]))
    assert main(["data", "audit", str(config), "--workers", "1"]) == 0
    assert record.read_bytes() == before


def test_a_problem_ends_with_status_1(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "text" / "b.jsonl", b"PK\x03\x04" + bytes(30))
    assert main(["data", "audit", str(config), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert "Problem: " in printed.out
    assert "b.jsonl: is zip data" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a subcommand is missing: name one"),
        (["audti"], "did you mean `megapipe data audit`"),
        (["audit", "run.toml", "--workers", "0"], "--workers 0 must be 1 or more"),
        (["audit", "run.toml", "--worker", "1"], "did you mean --workers"),
    ],
)
def test_misspelt_words(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        run(words)


def test_help_names_each_action(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "audit" in capsys.readouterr().out
