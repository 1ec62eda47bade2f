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
