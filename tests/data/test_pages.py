"""The commands of the pages on data, run as they stand in a place with a small run."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from megapipe.tools.cli import main
from tests.corpus import CONFIG, VOCABULARY
from tests.data.samples import write

DOCS = Path(__file__).parents[2] / "docs"
SOURCES = """
[[data.sources]]
name = "web"
path = "data/web/*.jsonl"
id_field = "id"
weight = 3

[[data.sources]]
name = "books"
path = "data/books/*.jsonl"
id_field = "id"
"""


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_commands(block: str, *more: str) -> None:
    """Every command of a block, in order; `more` is for trainings."""
    for line in block.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "megapipe"
        assert main(words + [*more] * (words[0] == "train")) == 0, line


def append(text: str) -> None:
    """To the config of the pages."""
    path = Path("mine.toml")
    path.write_text(path.read_text(encoding="utf-8") + "\n" + text, encoding="utf-8")


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the data that the pages name, and a run of 4 steps."""
    place = tmp_path_factory.mktemp("pages")
    paragraphs = (corpus / "text" / "json.txt").read_text(encoding="utf-8").split("\n\n")[:60]
    for number, name in enumerate(["web/0", "web/1", "books/0"]):
        rows = [
            {"id": f"doc-{20 * number + place}", "text": text}
            for place, text in enumerate(paragraphs[20 * number :][:20])
        ]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        write(place / "data" / f"{name}.jsonl", content.encode())
    shutil.copy(corpus / "tokenizer.model", place)
    config = CONFIG.format(folder=".", steps=4, vocabulary=VOCABULARY)
    config = config[: config.index("[[data.sources]]")] + config[config.index("[checkpoint]") :]
    config = config.replace('"./run"', '"runs/mine"').replace("every = 5", "every = 2")
    (place / "mine.toml").write_text(config + SOURCES, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", "mine.toml"]) == 0
    return place


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.usefixtures("here")
def test_which_rows(capsys: pytest.CaptureFixture[str]) -> None:
    (commands,) = blocks("which-rows.md", "sh")
    run_commands(commands)
    said = capsys.readouterr().out
    assert "steps 3-4: equal to what was trained" in said
    assert "steps 1-4: equal to what was trained" in said
    step = json.loads(Path("step-3.json").read_text(encoding="utf-8"))["steps"][0]
    assert (step["step"], step["equal"], len(step["samples"])) == (3, True, 8)


@pytest.mark.usefixtures("here")
def test_deleting_data(capsys: pytest.CaptureFixture[str]) -> None:
    before, after, proof, gone = blocks("deleting-data.md", "sh")
    _, exclude, change = blocks("deleting-data.md", "toml")
    (ids,) = blocks("deleting-data.md", "json")
    run_commands(before)
    (row,) = json.loads(Path("before.json").read_text(encoding="utf-8"))["rows"]
    assert {use["step"] for one in row["passes"] for use in one["uses"]} == {3, 4}
    write(Path("deleted/0.jsonl"), ids.encode())
    append(exclude)
    run_commands(after, "--train.steps=8")
    steps = json.loads(Path("after.json").read_text(encoding="utf-8"))["steps"]
    rows = [row for step in steps for sample in step["samples"] for row in sample["rows"]]
    left = [row for row in rows if row["id"] in ("doc-2", "doc-39")]
    assert [(row["id"], row["part"]) for row in left] == [("doc-39", "cut short")]
    assert left[0]["end"] - left[0]["start"] == 1
    assert "excluded from step 5 on" in capsys.readouterr().out
    run_commands(proof)
    assert "steps 1-8: equal to what was trained" in capsys.readouterr().out
    old = Path("data/web/0.jsonl")
    lines = old.read_bytes().splitlines(keepends=True)
    write(Path("data/cleaned/0.jsonl"), b"".join(line for line in lines if b"doc-2" not in line))
    append(change)
    run_commands(gone, "--train.steps=10")
    run_commands(proof)
    old.unlink()
    assert main(["data", "trace", "runs/mine", "--steps", "9-10", "--verify-only"]) == 0
    capsys.readouterr()
    assert main(["data", "trace", "runs/mine", "--steps", "1-2", "--verify-only"]) == 1
    assert f"{old} had not left by then, and can't be read" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_changing_the_mix(capsys: pytest.CaptureFixture[str]) -> None:
    (commands,) = blocks("changing-the-mix.md", "sh")
    weights, files = blocks("changing-the-mix.md", "text")
    config = Path("mine.toml").read_text(encoding="utf-8")
    Path("other.toml").write_text(config.replace("weight = 3", "weight = 1"), encoding="utf-8")
    assert main(["train", "other.toml"]) == 1
    assert weights in capsys.readouterr().err
    shutil.copy("data/web/1.jsonl", "data/web/2.jsonl")
    assert main(["train", "mine.toml"]) == 1
    assert files.split("\n", 1)[1] in capsys.readouterr().err
    Path("data/web/2.jsonl").unlink()
    append("".join(blocks("changing-the-mix.md", "toml")))
    shutil.copytree("data/books", "data/new")
    run_commands(commands, "--train.steps=8")
    said = capsys.readouterr().out
    assert "steps 7-8: equal to what was trained" in said
    assert said.count("step 7: 8 samples") == 1


def test_the_tokenizer_of_a_checkpoint_will_do(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "tokenizer.model").unlink()
    words = ["data", "trace", "runs/mine", "--steps", "2", "--verify-only"]
    assert main(words) == 0
    for copy in here.glob("runs/mine/checkpoints/*/tokenizer.model"):
        copy.unlink()
    assert main(words) == 1
    assert "is neither at data.tokenizer = " in capsys.readouterr().err
