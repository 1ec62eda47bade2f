"""docs/adding-an-axis.md does what it says: its diff is applied to a copy of the source, and there
the new axis is checked, shown and trained on. A place that forgets the axis is found."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.worked_examples import apply_diff, blocks, copy_source, metrics, replace, run

(DIFF,) = blocks("adding-an-axis.md", "diff")
COMMANDS = blocks("adding-an-axis.md", "sh")
CONFIG = """\
parallel = { pipeline = 2, sites = 2, data = 2 }

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
sources = [{ path = "text/*.txt" }]
"""
ONE_AXIS = ("--parallel.pipeline=1", "--parallel.sites=2", "--parallel.data=1")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source with the page's diff, and a config."""
    folder = copy_source(tmp_path_factory.mktemp("house"))
    changed = apply_diff(folder, DIFF)
    assert changed == {"megapipe/config/axes.py", "megapipe/config/parallel.py"}
    (folder / "run.toml").write_text(CONFIG, encoding="utf-8")
    return folder


def test_eight_ranks_equal_one_process(house: Path) -> None:
    said = run(house, "verify", "run.toml", "--steps=2")
    assert "PASSED: the layout equals one process over 2 steps" in said
    assert "sites 0, pipeline 1, data 0, tensor 0" in said


def test_the_dry_run_shows_it(house: Path) -> None:
    shown = run(house, "train", "run.toml", "--dry-run")
    assert "Layout: 8 ranks = sites 2 * pipeline 2 * data 2 * tensor 1" in shown
    rows = [line.split() for line in shown.splitlines() if re.match(r"  (rank|[0-7]) ", line)]
    assert rows[0] == ["rank", "sites", "pipeline", "data", "tensor", "stages"]
    assert rows[1:9] == [
        [str(rank), *f"{rank:03b}", "0", str(rank // 2 % 2)] for rank in range(8)
    ]


def test_the_dry_run_of_many_ranks_has_a_line_for_each_stage_of_each_site(house: Path) -> None:
    words = ("--parallel.tensor=2", "--train.global_batch_size=32", "--parallel.data=4")
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


def test_numbers_that_do_not_fit_name_it(house: Path) -> None:
    words = ("train", "run.toml", "--dry-run", "--parallel.sites=3")
    said = run(house, *words, status=1)
    assert "must be a multiple of parallel.sites 3 * parallel.data 2 * train.micro_batch_size" in said
    said = run(house, "train", "run.toml", "--dry-run", "--world-size=4", status=1)
    assert "parallel.sites 2 * parallel.data 2 = 8 processes, and there are 4" in said
    said = run(house, "train", "run.toml", "--dry-run", "--parallel.site=2", status=1)
    assert "did you mean parallel.sites?" in said


def trained(source: Path, corpus: Path, run_dir: Path, *words: str, status: int = 0) -> str:
    """What a run of four steps in float64 prints, with a checkpoint at its end."""
    words = ("--train.precision=fp64", "--train.steps=4", f"--train.run_dir={run_dir}", *words)
    return run(source, "train", str(corpus / "run.toml"), *words, status=status)


def test_training_equals_that_of_as_many_data_ranks(
    house: Path, corpus: Path, tmp_path: Path
) -> None:
    trained(house, corpus, tmp_path / "data", "--parallel.data=2")
    trained(house, corpus, tmp_path / "sites", "--parallel.sites=2", "--parallel.data=1")
    expected = metrics(tmp_path / "data")
    assert len(expected) == 4
    assert metrics(tmp_path / "sites") == expected, "bitwise"


class Forgotten(NamedTuple):
    """A place that asks for one axis where the kind of axis is what matters."""

    file: str
    right: str
    wrong: str
    found: str


VERIFIED = {
    "gradients are summed over data ranks": Forgotten(
        "megapipe/data_parallel/reduce.py",
        "start_all_reduce(bucket, mesh.batch)",
        'start_all_reduce(bucket, mesh.parts["data"])',
        r"FAILED in step 1: gradient .* on rank \d \(sites \d, pipeline 0, data 0, tensor 0\)",
    ),
    "data ranks have different samples": Forgotten(
        "megapipe/data/synthetic.py",
        "range(first + mesh.batch.rank,",
        'range(first + mesh.parts["data"].rank,',
        "FAILED in step 1: loss",
    ),
    "each site counts the norm": Forgotten(
        "megapipe/train/engine.py",
        "if self.mesh.batch.is_first:",
        'if self.mesh.parts["data"].is_first:',
        "FAILED in step 1: gradient norm",
    ),
    "its row says that it splits tensors": Forgotten(
        "megapipe/config/axes.py",
        'AxisKind("sites", Splits.SAMPLES)',
        'AxisKind("sites", Splits.TENSORS)',
        "FAILED in step 1: gradient",
    ),
}


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_finds_a_place_that_forgets_it(house: Path, tmp_path: Path, name: str) -> None:
    place = VERIFIED[name]
    copy_source(tmp_path, house)
    replace(tmp_path / place.file, place.right, place.wrong)
    said = run(tmp_path, "verify", str(house / "run.toml"), *ONE_AXIS, "--steps=1", status=1)
    assert re.search(place.found, said), said
    assert "Traceback" not in said


TRAINED = {
    "each site reads the same text": Forgotten(
        "megapipe/data/distribute.py",
        "data_rank=self._mesh.batch.rank,",
        'data_rank=self._mesh.parts["data"].rank,',
        "",
    ),
    "each site saves a checkpoint": Forgotten(
        "megapipe/train/checkpoints.py",
        "if not self.mesh.batch.is_first:",
        'if not self.mesh.parts["data"].is_first:',
        "",
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_finds_a_place_that_forgets_it(
    house: Path, corpus: Path, tmp_path: Path, name: str
) -> None:
    place = TRAINED[name]
    copy_source(tmp_path, house)
    replace(tmp_path / place.file, place.right, place.wrong)
    words = ("--parallel.sites=2", "--parallel.data=1")
    said = trained(tmp_path, corpus, tmp_path / "run", *words, status=1)
    assert re.search(place.found, said), said
