"""docs/adding-a-model-family.md does what it says: its files are put where it says into a copy of
the checkout, and there the new family is checked, trained and found by everything else. A table
that is wrong is found."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worked_examples import (
    blocks,
    copy_source,
    metrics,
    page_text,
    replace,
    run,
    run_tests,
)

PAGE = "adding-a-model-family.md"
NAMES = ("config", "parameters", "costs", "model", "family", "__init__", "test")
FILES = dict(zip(NAMES, blocks(PAGE, "python"), strict=True))
(CONFIG,) = blocks(PAGE, "toml")
DRY_RUN, VERIFY, TRAIN = (line.split()[1:] for line in blocks(PAGE, "sh")[0].splitlines())
SHOWN, PASSED, FAILED = blocks(PAGE, "")
FOLDER, TEST = "models/convolution", "tests/models/test_convolution.py"
ONE_PROCESS = ("--parallel.tensor=1", "--parallel.pipeline=1")
TENSOR_RANKS = ("--parallel.pipeline=1", "--steps=1")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A copy with the page's folder, its test and its config, beside a corpus."""
    folder = copy_source(tmp_path_factory.mktemp("checkout"), others=("tests", "docs"))
    (folder / FOLDER).mkdir()
    for name, text in FILES.items():
        place = TEST if name == "test" else f"{FOLDER}/{name}.py"
        (folder / place).write_text(text, encoding="utf-8")
    (folder / "run.toml").write_text(CONFIG, encoding="utf-8")
    shutil.copytree(corpus / "text", folder / "text")
    shutil.copy(corpus / "tokenizer.model", folder)
    return folder


def test_the_page_names_its_files() -> None:
    named = re.findall(r"^### .*: `(\w+)\.py`$", page_text(PAGE), re.MULTILINE)
    assert named == list(NAMES[:-1])


def test_the_layout_equals_one_process(checkout: Path) -> None:
    assert run(checkout, *VERIFY).endswith(PASSED)


def test_its_test_and_those_of_all_families_pass(checkout: Path) -> None:
    files = ["models/test_convolution", "models/test_families", "config/test_family"]
    files += ["tools/test_field_help", "structure/test_tree"]
    said = run_tests(checkout, "-v", *(f"tests/{file}.py" for file in files))
    passed = set(re.findall(r"^tests/models/test_convolution\.py::(\w+).* PASSED", said, re.M))
    assert passed == set(re.findall(r"def (test_\w+)", FILES["test"]))


def test_a_run_of_four_ranks_goes_on_in_one_process(checkout: Path) -> None:
    words = (*TRAIN, "--train.precision=fp64", "--logging.wandb=off")
    run(checkout, *words, *ONE_PROCESS, "--train.run_dir=alone")
    run(checkout, *words, "--train.steps=2")
    said = run(checkout, *words, *ONE_PROCESS)
    assert "step-00000002 at step 2" in said
    steps, expected = metrics(checkout / "run"), metrics(checkout / "alone")
    assert len(steps) == len(expected) == 4
    assert steps[-1][0] < steps[0][0], "it learns"
    for row, alone in zip(steps, expected, strict=True):
        assert row == pytest.approx(alone, rel=1e-9)


def test_the_dry_run_help_and_schema_know_it(checkout: Path) -> None:
    shown = run(checkout, *DRY_RUN)
    for part in SHOWN.split("\n\n"):
        assert part in shown
    helped = run(checkout, "train", "--help")
    heading = '[model] with family = "convolution" has besides the common keys:'
    assert "--model.kernel_width INTEGER" in helped[helped.index(heading) :]
    assert re.search(r"--model\.family convolution, for .*:\n  convolution-micro\n", helped)
    schema: dict[str, Any] = json.loads(run(checkout, "schema"))
    assert {"$ref": "#/$defs/ConvolutionConfig"} in schema["properties"]["model"]["anyOf"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--parallel.tensor=3", "must divide model.channels = 128"),
        ("--model.kernel_width=200", "is more than model.max_sequence_length = 128"),
        ("--model.num_heads=4", 'belongs to model.family = "gpt"'),
    ],
)
def test_its_section_says_what_contradicts_it(checkout: Path, word: str, said: str) -> None:
    assert said in run(checkout, *DRY_RUN, word, status=1)


@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [
        ('gain("steepness", 1, "always")', 'gain("steepness", 1, "never")', FAILED.strip()),
        (
            'gain("norm", hidden, "sequence")',
            'gain("norm", hidden, "never")',
            "FAILED in step 1: gradient layers.0.norm.weight on rank ",
        ),
    ],
    ids=["each rank uses it on its channels", "each rank applies it to its part of the sequence"],
)
def test_verify_finds_a_sum_that_is_missing(
    checkout: Path, tmp_path: Path, right: str, wrong: str, found: str
) -> None:
    copy_source(tmp_path / "wrong", checkout)
    replace(tmp_path / "wrong" / FOLDER / "parameters.py", right, wrong)
    config = str(checkout / "run.toml")
    said = run(tmp_path / "wrong", "verify", config, *TENSOR_RANKS, status=1)
    assert found in said
