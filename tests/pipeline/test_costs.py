"""Stage costs from a file, and what is said about wrong ones."""

from pathlib import Path

import pytest

from megapipe.errors import ScheduleError
from megapipe.pipeline.costs import read_costs
from megapipe.pipeline.schedule import Costs


def write(folder: Path, text: str) -> Path:
    path = folder / "costs.toml"
    path.write_text(text)
    return path


GOOD = "forward = [0.1, 0.2]\nbackward_input = 0.3\nbackward_weight = 0\n"
BYTES = 3_000_000


def test_numbers_are_for_all_stages(tmp_path: Path) -> None:
    costs = read_costs(write(tmp_path, GOOD + "latency = 0.01"), 2, BYTES)
    assert costs == Costs([0.1, 0.2], [0.3, 0.3], [0.0, 0.0], 0.01)
    assert read_costs(write(tmp_path, GOOD), 2, BYTES).latency == 0


def test_a_tensor_takes_as_long_as_its_size_over_the_bandwidth(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "latency = 0.01\nbandwidth = 1e9")
    assert read_costs(path, 2, BYTES).latency == pytest.approx(0.013)
    assert read_costs(path, 2, 2 * BYTES).latency == pytest.approx(0.016)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("forward", "forwards", 1), "forwards is not a key .* keys are forward, back"),
        ("forward = 1\nbackward_input = 1", "backward_weight is missing: give seconds"),
        (GOOD.replace("0.2", "0.2, 0.3"), "forward has 3 entries, and .* = 2: give one for each"),
        (GOOD.replace("0.2", "-0.2"), r"forward\[1\] = -0.2 must be a time in seconds, 0 or more"),
        (GOOD.replace("0.3", "true"), "backward_input = true must be a time"),
        (GOOD.replace("0.3", "nan"), "backward_input = nan must be a time"),
        (GOOD + 'latency = "1 ms"', 'latency = "1 ms" must be a time'),
        (GOOD + "bandwidth = 0", "bandwidth = 0 must be bytes a second, above 0"),
        (GOOD + 'bandwidth = "25 GB"', 'bandwidth = "25 GB" must be bytes a second'),
        ("forward = 0\nbackward_input = 0\nbackward_weight = 0", "all times are zero"),
        ("forward = [", 'parallel.stage_costs = ".*costs.toml" can\'t be read: '),
    ],
)
def test_wrong_ones_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=message):
        read_costs(write(tmp_path, text), 2, BYTES)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ScheduleError, match=r'parallel.stage_costs = "nowhere.toml" can.t be read'):
        read_costs("nowhere.toml", 2, BYTES)
