"""The documents: links lead somewhere, and commands, keys and examples are those that exist."""

import re
import textwrap
import tomllib
from pathlib import Path

import pytest

from megapipe.config import Config, section_types
from megapipe.config.load import load_config
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import GPTConfig
from megapipe.pipeline import build_program, lower, validate
from megapipe.pipeline.costs import read_costs
from megapipe.pipeline.schedule import SCHEDULES
from megapipe.tools.arguments import config_keys
from megapipe.tools.cli import COMMANDS
from tests.config.examples import write

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code(path: Path) -> str:
    """Everything that stands in code: spans, fenced and indented blocks."""
    fenced = re.findall(r"```\w*\n(.*?)```", text(path), re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`]+)`", unfenced(path))])


def unfenced(path: Path) -> str:
    return re.sub(r"```.*?```", "", text(path), flags=re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(path), re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", unfenced(path)):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_keys_exist(path: Path) -> None:
    for command in re.findall(r"\bmegapipe ([a-z]+)\b(?!\()", code(path)):
        assert command in COMMANDS, command
    sections = "|".join(section_types())
    added = re.findall(r"^\+?    (\w+): .* = Field\($", code(path), re.MULTILINE)  # by this page
    # Names of tensors (model.norm.weight) and calls (model.generate()) look like keys.
    key_of = rf"(?<![\w./])(?:--)?({sections})\.(?!py\b|safetensors\b)([a-z]\w*)\b(?!\.\w|\()"
    for section, key in re.findall(key_of, code(path)):
        assert key in added or f"{section}.{key}" in config_keys(), (section, key)
    folders = "megapipe|kernels|models|tests|launch"
    for file in re.findall(rf"(?<!\]\()\b(?:{folders})/[\w/]+\.\w+", code(path)):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_toml_examples_are_valid(path: Path) -> None:
    sections = section_types(GPTConfig)
    for block in blocks(path, "toml"):
        tree = tomllib.loads(block)
        for name, values in tree.items():
            assert set(values) <= set(sections[name].model_fields), name


def test_the_readme_config_runs_as_it_stands(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "README.md", "toml")
    path = tmp_path / "run.toml"
    path.write_text(block, encoding="utf-8")
    config = load_config(path, [], FAMILIES)
    assert isinstance(config, Config)
    commands = "\n".join(blocks(ROOT / "README.md", "sh"))
    assert f"--vocab-size {config.model.vocab_size} --out {config.data.tokenizer}" in commands
    assert f"megapipe generate {config.train.run_dir}" in commands
    assert f"'{config.data.sources[0].path}'" in commands


def test_the_schedule_example_of_the_layouts_page() -> None:
    (example,) = blocks(ROOT / "docs" / "layouts.md", "python")
    assert "lower(build_program(" in example
    validate(lower(build_program("1f1b", pipeline=4, virtual=1, microbatches=8)))


def test_the_auto_example_and_its_costs_are_of_as_many_stages(tmp_path: Path) -> None:
    page = ROOT / "docs" / "pipeline.md"
    (block,) = blocks(page, "toml")
    (costs,) = re.findall(r"(?:^    [a-z_]+ = .*\n)+", text(page), re.MULTILINE)
    file = tmp_path / "costs.toml"
    file.write_text(textwrap.dedent(costs), encoding="utf-8")
    keys = tomllib.loads(block)["parallel"] | {"stage_costs": file}
    words = [f"--parallel.{key}={value}" for key, value in keys.items()]
    parallel = load_config(write(tmp_path), words, FAMILIES).parallel
    assert parallel.schedule == "auto"
    assert read_costs(file, parallel.pipeline * parallel.virtual, 25_000_000).latency > 1e-3


def test_the_table_of_the_layouts_page_has_every_schedule() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", text(ROOT / "docs" / "layouts.md"), re.MULTILINE)
    assert {*SCHEDULES, "csv", "auto"} <= set(rows)
