"""logging.timeline: what it may say, and what is told otherwise."""

from pathlib import Path

import pytest

from megapipe.config import load_config
from megapipe.config.logging import parse_steps
from megapipe.errors import ConfigError
from megapipe.models.families import FAMILIES
from tests.config.examples import TEXT, write


@pytest.mark.parametrize(
    ("text", "steps"),
    [("20", [20]), ("20-22", [20, 21, 22]), (" 1 - 2 ", [1, 2]), ("7-14", list(range(7, 15)))],
)
def test_steps(text: str, steps: list[int]) -> None:
    assert list(parse_steps(text)) == steps


def test_a_number_or_text_in_the_file_and_on_the_command_line(tmp_path: Path) -> None:
    for value in ("20", '"20-22"'):
        path = write(tmp_path, f"{TEXT}\n[logging]\ntimeline = {value}\n")
        assert load_config(path, [], FAMILIES).logging.timeline == value.strip('"')
    assert load_config(path, ["--logging.timeline", "3-4"], FAMILIES).logging.timeline == "3-4"
    assert load_config(path, ["--logging.timeline=3"], FAMILIES).logging.timeline == "3"
    assert load_config(path, ["--logging.timeline=none"], FAMILIES).logging.timeline is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x", 'logging.timeline = "x" must be a step, as in 20, or a few in a row, as in 20-22'),
        ("0", "must begin with step 1 or later"),
        ("22-20", "ends before it begins: write 20-22"),
        ("20-40", "is 21 steps, and ranks remember their last 8: write 20-27"),
        ("99-101", "is after the last step, train.steps = 100"),
        ("true", "logging.timeline = true must be text"),
        ("9" * 5000, "must be a step, as in 20"),
        ("1-" + "9" * 5000, "must be a step, as in 20"),
    ],
)
def test_what_it_can_not_be(tmp_path: Path, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path), [f"--logging.timeline={value}"], FAMILIES)
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


def test_a_project_name_that_w_and_b_refuses_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, f'{TEXT}\n[logging]\nwandb_project = "team/project"\n')
    with pytest.raises(ConfigError, match=r"wandb_project = \"team/project\" has a '/', which W&B"):
        load_config(path, [], FAMILIES)
