"""A step is shown before it is trained, as it will be."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megapipe.data.order.record import RECORD
from megapipe.data.positions import positions_in
from megapipe.data.trace.preview import document_ranges, read_ahead, token_texts
from megapipe.errors import DataError
from tests.bars import no_bar
from tests.data.samples import data_config, document, jsonl, source, write
from tests.data.trace.simulated import Simulated, Start, Tokens, run_config, simulate

EVERY = 4


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    """A run of 10 steps on the start of `folder / a.jsonl`."""
    folder = tmp_path_factory.mktemp("short")
    path = write(folder / "a.jsonl", jsonl(map(document, range(60))))
    return simulate(folder, [Start(10, 2, data_config(source(path, "s"), streams=8))], EVERY)


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("number", [1, 7, 10])
def test_a_step_is_read_as_it_is_trained(
    short: Simulated, tmp_path: Path, number: int, positions: bool
) -> None:
    folder = short.directory.parent
    run_dir = shutil.copytree(short.directory, tmp_path / "run")
    for at, path in positions_in(run_dir / RECORD).items():
        if not positions or at >= number:
            path.unlink()
    before = sorted(run_dir.rglob("*"))
    config = run_config(folder, data_config(source(folder / "a.jsonl", "s"), streams=8))
    train = config.train.model_copy(update={"run_dir": str(run_dir)})
    config = config.model_copy(update={"train": train})
    preview = read_ahead(config, Tokens(), number, no_bar)
    parts = short.steps[number]
    expected = np.concatenate([part.tokens for part in parts])[[0, 4, 1, 5, 2, 6, 3, 7]]
    assert np.array_equal(preview.step.batch.tokens, expected)
    assert (preview.step.number, preview.step.first, preview.past) == (
        number,
        8 * number - 8,
        False,
    )
    assert sorted(run_dir.rglob("*")) == before


def test_a_config_that_its_run_does_not_go_on_with_is_refused(short: Simulated) -> None:
    folder = short.directory.parent
    data = data_config(source(folder / "a.jsonl", "s"), streams=8)
    assert read_ahead(run_config(folder, data), Tokens(), 3, no_bar).past
    other = run_config(folder, data.model_copy(update={"open_parts": 3}))
    with pytest.raises(DataError, match="open_parts was 1024 and is now 3"):
        read_ahead(other, Tokens(), 12, no_bar)


def test_token_texts_are_what_each_token_adds() -> None:
    tokens = np.array([*Tokens().encode("aé"), 0, *Tokens().encode("b")], dtype=np.int32)
    assert list(token_texts(Tokens(), tokens)) == ["a", "\ufffd", "é", "<end>", "b"]


def test_documents_of_a_sample() -> None:
    assert document_ranges(np.array([0, 0, 0, 1, 2, 2])) == [(0, 2), (3, 3), (4, 5)]
    assert document_ranges(np.array([0, 0])) == [(0, 1)]
