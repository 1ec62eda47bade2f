"""Positions in the data, which a run keeps for ever."""

from pathlib import Path

import pytest

from megapipe.data.positions import begin_positions, positions_in, read_position, write_position
from megapipe.errors import DataError


def test_a_position_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = {
        "step": 7,
        "streams": {"0": {"last": None, "sources": {"a": {"open": [[0, 3, 1, 9]]}}}},
    }
    path = write_position(tmp_path, 7, {"step": 1})
    assert write_position(tmp_path, 7, state) == path  # the newer one counts
    assert read_position(path) == state
    assert [entry.name for entry in path.parent.iterdir()] == ["step-00000007.json.zst"]


def test_a_run_that_goes_on_keeps_those_of_steps_before(tmp_path: Path) -> None:
    begin_positions(tmp_path, 0, {"start": 1})
    for step in (100, 50, 150):
        write_position(tmp_path, step, {"step": step})
    begin_positions(tmp_path, 100, {"start": 2})
    assert list(positions_in(tmp_path)) == [0, 50, 100]
    states = [read_position(path) for path in positions_in(tmp_path).values()]
    assert states == [{"start": 1}, {"step": 50}, {"start": 2}]


def test_other_files_are_no_positions(tmp_path: Path) -> None:
    assert positions_in(tmp_path) == {}
    write_position(tmp_path, 3, {})
    (tmp_path / "positions" / ".step-00000004.json.zst.1f2e3d4c").write_bytes(b"torn")
    assert list(positions_in(tmp_path)) == [3]


@pytest.mark.parametrize("change", ["cut", "changed"])
def test_a_damaged_position_is_named(tmp_path: Path, change: str) -> None:
    path = write_position(tmp_path, 3, {"streams": list(range(1000))})
    content = path.read_bytes()
    path.write_bytes(content[:-5] if change == "cut" else b"x" + content[1:])
    with pytest.raises(DataError, match=r"step-00000003\.json\.zst: is damaged"):
        read_position(path)
