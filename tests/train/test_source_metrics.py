"""What is reported of each source."""

from pathlib import Path

import pytest

from megapipe.config import load_config
from megapipe.models.families import FAMILIES
from megapipe.step_sums import Totals
from megapipe.train.source_metrics import (
    SOURCE_LOSSES,
    SOURCE_TOKENS,
    metrics_by_source,
    source_names,
    validation_source_names,
)
from tests.config.examples import write


def totals(tokens: list[float], losses: list[float], counted: float = 40) -> Totals:
    return Totals({"tokens": [counted], SOURCE_TOKENS: tokens, SOURCE_LOSSES: losses})


def test_tokens_shares_and_mean_losses() -> None:
    found = metrics_by_source(["a", "b", "c"], totals([30, 0, 10], [60.0, 0.0, 50.0]))
    assert found == {
        "a": {"tokens": 30, "share": 0.75, "loss": 2.0},
        "b": {"tokens": 0, "share": 0.0, "loss": None},
        "c": {"tokens": 10, "share": 0.25, "loss": 5.0},
    }


def test_batches_that_name_no_sources_have_none() -> None:
    assert metrics_by_source(["a", "b"], totals([0, 0], [0.0, 0.0])) is None


@pytest.mark.parametrize("tokens", [[30, 9], [60, 20]])
def test_a_token_that_is_not_counted_once_is_found(tokens: list[float]) -> None:
    with pytest.raises(AssertionError, match=r"^sources have \d+ of 40 tokens$"):
        metrics_by_source(["a", "b"], totals(tokens, [1.0, 1.0]))


def test_validation_has_its_own_sources_or_those_of_training(tmp_path: Path) -> None:
    own = "--data.validation_sources=[{name='held-out', path='b.txt'}]"
    path = write(tmp_path)
    for words, expected in (([own], ["held-out"]), ([], ["a"])):
        config = load_config(path, words, FAMILIES)
        assert source_names(config) == ["a"]
        assert validation_source_names(config) == expected
