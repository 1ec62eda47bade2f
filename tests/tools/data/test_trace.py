"""`megapipe data trace` and `megapipe data look`: words, exit status, and what is said."""

import json
from pathlib import Path

import pytest

from megapipe.errors import DataError, UsageError
from megapipe.tools.data import look, trace
from tests.data.samples import data_config, document, source, write
from tests.data.trace.simulated import Simulated, Start, Tokens, rows, simulate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    folder = tmp_path_factory.mktemp("run")
    lines = "\n".join(json.dumps(row) for row in rows(0, 60)).encode()
    path = write(folder / "a.jsonl", lines)
    data = data_config(source(path, "s", id_field="id"), streams=8)
    return simulate(folder, [Start(6, 2, data)], every=3)


@pytest.fixture(autouse=True)
def _byte_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapipe.data.trace.replay.load_tokenizer", lambda place: Tokens())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Name steps with --steps, or a row"),
        (["--steps", "1", "--id", "x"], "Name steps with --steps, or a row"),
        (["--steps", "3-2"], "the first step is 1, and the last must not be before"),
        (["--steps", "0"], "the first step is 1"),
        (["--steps", "x"], "x is no step, such as 7, or steps: 7-9"),
        (["--id", "x", "--text"], "--text and --verify-only are for --steps"),
        (["--steps", "1", "--text", "--verify-only"], "leave --text out"),
        (["--row", "a.jsonl"], "--row a.jsonl names no row: write FILE:PLACE"),
    ],
)
def test_words_that_ask_for_nothing(run: Simulated, words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        trace.run([str(run.directory), *words])


def test_places_that_are_no_run(run: Simulated, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"resolved-config\.toml: can't be read.* Name the direct"):
        trace.run([str(tmp_path), "--steps", "1"])
    with pytest.raises(DataError, match="--steps 5-7: the run has come to step 6"):
        trace.run([str(run.directory), "--steps", "5-7"])


def test_texts_of_a_step(run: Simulated, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.run([str(run.directory), "--steps", "2", "--text"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("step 2\n  sample 1 (number 8 of the run)\n    tokens 1-")
    assert printed.endswith("step 2: equal to what was trained\n")
    assert sum(f'"{document(number)}"' in printed for number in range(60)) >= 1


def test_steps_that_differ_or_are_missing(
    run: Simulated, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run.directory / "metrics.jsonl"
    kept = metrics.read_text()
    lines = kept.splitlines(keepends=True)
    again = json.dumps(json.loads(lines[4]) | {"batch_hash": "0" * 16}) + "\n"
    metrics.write_text("".join([*lines[:1], *lines[2:], again]))
    status = trace.run([str(run.directory), "--steps", "1-6", "--verify-only"])
    metrics.write_text(kept)
    said = capsys.readouterr().out.splitlines()
    assert status == 1
    assert said[:3] == [
        "step 1: equal to what was trained",
        "step 2: not in metrics.jsonl",
        "steps 3-4: equal to what was trained",
    ]
    assert said[3].startswith("step 5: DIFFERS from what was trained (hash ")
    assert said[4] == "step 6: equal to what was trained"
    assert said[5].startswith("Step 5 is the first that differs. It read ")


def test_uses_of_a_row(run: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert trace.run([str(run.directory), "--id", "id-7", "--json", str(out)]) == 0
    path = run.directory.parent / "a.jsonl"
    place = path.read_bytes().index(b'{"id": "id-7"')
    assert capsys.readouterr().out.startswith(f"s: {path}, byte {place:,}\n  ")
    assert trace.run([str(run.directory), "--row", f"{path}:{place}"]) == 0
    (row,) = json.loads(out.read_bytes())["rows"]
    assert (row["file"], row["place"]) == (str(path), f"byte {place:,}")
    capsys.readouterr()
    assert trace.run([str(run.directory), "--id", "nobody"]) == 1
    assert capsys.readouterr().out == "No row has the id nobody.\n"


@pytest.mark.parametrize("option", ["step", "samples", "tokens"])
def test_a_look_at_nothing(option: str) -> None:
    with pytest.raises(UsageError, match=f"--{option} 0 must be 1 or more"):
        look.run(["a.toml", "--step", "1", f"--{option}", "0"])
