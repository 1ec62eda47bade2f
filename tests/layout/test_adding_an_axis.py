"""docs/adding-an-axis.md does what it says: its diff is applied to a copy of the source, and there
the new axis is checked, shown and trained on. A place that forgets the axis is found."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.worked_examples import (
    Values,
    apply_diff,
    blocks,
    copy_source,
    metrics,
    page_text,
    replace,
    run,
)

PAGE = "adding-an-axis.md"
(DIFF,) = blocks(PAGE, "diff")
DRY_RUN, VERIFY = (block.split()[1:] for block in blocks(PAGE, "sh"))
SHOWN, VERDICT = blocks(PAGE, "")
CONFIG = """\
[model]
num_layers = 2
hidden_size = 16
num_heads = 2
vocab_size = 300
max_sequence_length = 32

[train]
run_dir = "run"
steps = 1
global_batch_size = 16
micro_batch_size = 2
sequence_length = 16

[data]
tokenizer = "tokenizer.model"
sources = [{ name = "text", path = "text/*.txt" }]
"""
EIGHT = ("--parallel.sites=2", "--parallel.pipeline=2", "--parallel.data=2")
ONLY_SITES = ("--parallel.sites=2", "--parallel.data=1")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source with the page's diff, and a config."""
    folder = copy_source(tmp_path_factory.mktemp("house"))
    changed = apply_diff(folder, DIFF)
    assert changed == {"megapipe/config/axes.py", "megapipe/config/parallel.py"}
    (folder / "run.toml").write_text(CONFIG, encoding="utf-8")
    return folder


# --- What follows by itself ----------------------------------------------------------------------


def test_two_sites_equal_one_process(house: Path) -> None:
    said = run(house, *VERIFY)
    assert said.endswith(VERDICT)
    assert "parallel.data: none -> 2" in said, "four ranks"
    assert re.search(r"rank \d \(sites \d, pipeline 0, data \d, tensor 0\)", said)


def test_the_dry_run_shows_it(house: Path) -> None:
    shown = run(house, *DRY_RUN)
    for part in SHOWN.split("\n\n"):
        assert part in shown


def test_the_dry_run_of_many_ranks_has_a_line_for_each_stage_of_each_site(house: Path) -> None:
    words = (*EIGHT, "--parallel.tensor=2", "--train.global_batch_size=32", "--parallel.data=4")
    shown = run(house, "train", "run.toml", "--dry-run", *words)
    table = re.search(r"  ranks .*?\n\n", shown, re.DOTALL)
    assert table is not None
    assert [line.split() for line in table[0].splitlines()[:5]] == [
        ["ranks", "sites", "pipeline", "data", "tensor", "stages"],
        ["0-7", "0", "0", "0-3", "0-1", "0"],
        ["8-15", "0", "1", "0-3", "0-1", "1"],
        ["16-23", "1", "0", "0-3", "0-1", "0"],
        ["24-31", "1", "1", "0-3", "0-1", "1"],
    ]
    formula = "rank = ((sites * 2 + pipeline) * 4 + data) * 2 + tensor"
    assert f"{formula}, so the first 2 ranks of a line are data 0" in table[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            (*EIGHT, "--parallel.sites=3"),
            "must be a multiple of parallel.sites 3 * parallel.data 2 * train.micro_batch_size",
        ),
        (
            (*EIGHT, "--world-size=4"),
            "parallel.sites 2 * parallel.data 2 = 8 processes, and there are 4",
        ),
        (
            (*EIGHT, "--data.streams=6"),
            "must be a multiple of parallel.sites * parallel.data = 4, since each replica reads",
        ),
        (("--parallel.site=2",), "did you mean parallel.sites?"),
    ],
)
def test_numbers_that_do_not_fit_name_it(house: Path, words: tuple[str, ...], said: str) -> None:
    assert said in run(house, "train", "run.toml", "--dry-run", *words, status=1)


def test_help_and_schema_know_it(house: Path) -> None:
    assert "  --parallel.sites INTEGER\n        Places that each" in run(house, "train", "--help")
    described = json.loads(run(house, "schema"))["$defs"]["ParallelConfig"]
    assert described["properties"]["sites"]["default"] == 1
    assert described["description"].endswith(" * sites.")


# --- Training ------------------------------------------------------------------------------------


def train(source: Path, corpus: Path, run_dir: Path, *words: str, status: int = 0) -> str:
    """What a run of four steps in float64 prints, with a checkpoint at its end."""
    words = (f"--train.run_dir={run_dir}", "--train.steps=4", *words)
    words = ("--train.precision=fp64", "--optimizer.schedule=constant", *words)
    return run(source, "train", str(corpus / "run.toml"), *words, status=status)


@pytest.fixture(scope="module")
def one_process(house: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Values:
    """The steps of a run of one process."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train(house, corpus, run_dir, "--parallel.data=1")
    return metrics(run_dir)


def agree(one: Values, other: Values) -> bool:
    """Losses, gradient norms and tokens of all steps, to rounding in float64."""
    return len(one) == len(other) and all(
        row == pytest.approx(expected, rel=1e-9) for row, expected in zip(one, other, strict=True)
    )


def test_training_and_resuming_in_another_layout_equal_one_process(
    house: Path, corpus: Path, tmp_path: Path, one_process: Values
) -> None:
    train(house, corpus, tmp_path / "run", *ONLY_SITES, "--train.steps=2")
    first = metrics(tmp_path / "run")
    assert len(first) == 2
    said = train(house, corpus, tmp_path / "run", "--parallel.pipeline=2", "--parallel.data=1")
    assert "step-00000002 at step 2" in said
    steps = metrics(tmp_path / "run")
    assert steps[:2] == first
    assert len(one_process) == 4
    assert agree(steps, one_process)


# --- Places that forget it -----------------------------------------------------------------------


class Forgotten(NamedTuple):
    """A place that asks for less than all axes that split samples, and what is then said."""

    file: str
    right: str
    wrong: str
    said: str


VERIFIED = {
    "the split of samples": Forgotten(
        "megapipe/data/synthetic.py",
        "range(first + mesh.batch.rank,",
        'range(first + mesh.parts["data"].rank,',
        r"FAILED in step 1: the loss differs by",
    ),
    "the sum of gradients": Forgotten(
        "megapipe/data_parallel/reduce.py",
        "start_all_reduce(bucket, mesh.batch)",
        'start_all_reduce(bucket, mesh.parts["data"])',
        r"FAILED in step 1: gradient \S+ on rank \d \(sites \d, pipeline 0, data 0, tensor 0\)",
    ),
    "the sums of the step": Forgotten(
        "megapipe/train/engine.py",
        "self._step_sums = StepSums(mesh.device, mesh.world)",
        "self._step_sums = StepSums(mesh.device, mesh.model_parallel)",
        r"FAILED in step 1: the loss differs by",
    ),
    "the choice of who counts the norm": Forgotten(
        "megapipe/train/engine.py",
        "if self.mesh.batch.is_first:",
        'if self.mesh.parts["data"].is_first:',
        r"FAILED in step 1: the gradient norm differs by",
    ),
    "its row, which says that it splits tensors": Forgotten(
        "megapipe/config/axes.py",
        'AxisKind("sites", Splits.SAMPLES)',
        'AxisKind("sites", Splits.TENSORS)',
        r"FAILED in step 1: gradient \S+ on rank \d \(sites ",
    ),
}


def with_mistake(house: Path, folder: Path, place: Forgotten) -> Path:
    copy_source(folder, house)
    replace(folder / place.file, place.right, place.wrong)
    return folder


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_finds_a_place_that_forgets_it(house: Path, tmp_path: Path, name: str) -> None:
    wrong = with_mistake(house, tmp_path / "wrong", VERIFIED[name])
    config = str(house / "run.toml")
    said = run(wrong, "verify", config, *ONLY_SITES, "--steps=1", status=1)
    assert re.search(VERIFIED[name].said, said), said
    assert "Traceback" not in said


def test_the_page_lists_what_verify_finds() -> None:
    (page,) = re.findall(r"^\| if the axis .*?\n\n", page_text(PAGE), re.DOTALL | re.MULTILINE)
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()[2:-1]]
    assert [row[0] for row in rows] == list(VERIFIED)[:4]
    for name, _, kind in rows:
        assert f"FAILED in step 1: {kind.removeprefix('a ')}" in VERIFIED[name].said


TRAINED = {
    "each site reads the same text": Forgotten(
        "megapipe/data/distribute.py",
        "replica=self._mesh.batch.rank,",
        'replica=self._mesh.parts["data"].rank,',
        r"rank \d \(sites \d, pipeline 0, data 0, tensor 0\) failed:",
    ),
    "each site saves a checkpoint": Forgotten(
        "megapipe/train/checkpoints.py",
        "if not self.engine.mesh.batch.is_first:",
        'if not self.engine.mesh.parts["data"].is_first:',
        r"cannot save checkpoint \S+: rank 0: tensor \S+: chunks .* overlap",
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_finds_a_place_that_forgets_it(
    house: Path, corpus: Path, tmp_path: Path, one_process: Values, name: str
) -> None:
    place = TRAINED[name]
    wrong = with_mistake(house, tmp_path / "wrong", place)
    said = train(wrong, corpus, tmp_path / "run", *ONLY_SITES, status=1)
    assert re.search(place.said, said), said
    if name == "each site saves a checkpoint":
        assert agree(metrics(tmp_path / "run"), one_process)
    else:
        assert not (tmp_path / "run" / "metrics.jsonl").exists(), "found before the first step"
