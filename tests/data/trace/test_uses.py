"""Every use of a row, against a look at every batch."""

import random
from collections import defaultdict
from pathlib import Path

import pytest

from megapipe.data.order.record import RECORD
from megapipe.data.positions import positions_in
from megapipe.data.trace.replay import Replay
from megapipe.data.trace.search import FoundRow, Wanted, find_rows, raw_of
from megapipe.data.trace.trained import read_trained
from megapipe.data.trace.uses import Uses
from megapipe.errors import DataError, UsageError
from tests.bars import no_bar
from tests.data.samples import data_config, document, jsonl, source, write
from tests.data.trace.simulated import Simulated, Start, open_replay, simulate

Key = tuple[str, str, int, int]
"""Source, file, start of the unit, address."""
Place = tuple[int, int, int, int, int]
"""Epoch, step, sample, first token and end."""


@pytest.fixture(scope="module")
def replay(run: Simulated) -> Replay:
    return open_replay(run)


def all_uses(run: Simulated) -> dict[Key, set[Place]]:
    found = defaultdict(set)
    for step, parts in run.steps.items():
        for batch in parts:
            for sample, stretches in zip(batch.samples, batch.stretches, strict=True):
                for one in stretches:
                    *key, epoch, _ = one.origin
                    place = epoch, step, sample, one.start, one.start + one.length
                    found[tuple(key)].add(place)  # type: ignore[index]
    return found


def key_of(replay: Replay, row: FoundRow) -> Key:
    source = next(one for one in replay.feed.sources if one.name == row.source)
    file, unit, raw = raw_of(source, row)
    return row.source, file.key, unit.start, raw.address


def uses_of(uses: Uses, row: FoundRow) -> set[Place]:
    return {
        (one.epoch, use.step, use.number, use.row.start, use.row.end)
        for one in uses.of(row)
        for use in one.uses
    }


def test_every_use_is_found(run: Simulated, replay: Replay) -> None:
    """Of rows of all sources, some of which were excluded, set aside, or left with their file."""
    expected = all_uses(run)
    uses = Uses(replay, read_trained(run.directory / "metrics.jsonl", 1, 0))
    chance = random.Random(3)
    ids = [f"id-{number}" for number in (3, 20, 1015, 2007, 5050, 7003, 20003)]
    rows = [row for one in ids for row in find_rows(replay.feed.orders, Wanted(one), **QUICK)]
    known = chance.sample([key for key in sorted(expected) if key[3] >= 0], 13)
    rows += [row_at(replay, key) for key in known]
    assert len(rows) == 20
    kinds = set()
    for row in rows:
        key = key_of(replay, row)
        assert uses_of(uses, row) == expected.get(key, set()), key
        kinds |= {one.why.split(" ")[0] for one in uses.of(row) if not one.uses}
    assert {"passed", "its", "not"} <= kinds  # excluded, its file left, not reached


QUICK = {"workers": 1, "bar": no_bar}


def row_at(replay: Replay, key: Key) -> FoundRow:
    """The row, found by its place."""
    source, file, unit, address = key
    order = next(one for one in replay.feed.orders if one.source.name == source)
    path = order.source.root / file
    table = path.suffix == ".parquet"
    (row,) = find_rows(
        replay.feed.orders, Wanted(None, str(path), (address + table, unit)), **QUICK
    )
    return row


def test_rows_that_are_never_trained_say_why(run: Simulated, replay: Replay) -> None:
    uses = Uses(replay, read_trained(run.directory / "metrics.jsonl", 1, 0))
    rows = find_rows(replay.feed.orders, Wanted("empty"), **QUICK)
    assert [uses.never(row) for row in rows] == ["without text"] * 3
    expected = all_uses(run)
    apart = [
        row
        for number in range(60)
        for row in find_rows(replay.feed.orders, Wanted(f"id-{number}"), **QUICK)
        if uses.never(row)
    ]
    assert 1 <= len(apart) < 10
    for row in apart:
        assert uses.never(row).startswith("set aside for validation")
        assert key_of(replay, row) not in expected
        assert all(not one.uses for one in uses.of(row))


def test_when_a_row_was_excluded(run: Simulated, replay: Replay) -> None:
    uses = Uses(replay, read_trained(run.directory / "metrics.jsonl", 1, 0))
    found = [
        uses.excluded_from(find_rows(replay.feed.orders, Wanted(one), **QUICK)[0])
        for one in ("id-3", "id-20", "id-1015")
    ]
    assert found == [[], [101], [351]]


def test_a_row_that_is_not_there_is_named(replay: Replay) -> None:
    assert find_rows(replay.feed.orders, Wanted("nobody"), **QUICK) == []
    path = replay.feed.sources[0].root / "0.jsonl"
    with pytest.raises(DataError, match=r"has no row at 5\. The nearest row before it is byte 0"):
        find_rows(replay.feed.orders, Wanted.of(None, f"{path}:5"), **QUICK)
    with pytest.raises(DataError, match=r"nowhere\.txt is no file of data\.sources"):
        find_rows(replay.feed.orders, Wanted.of(None, "nowhere.txt:5"), **QUICK)
    with pytest.raises(UsageError, match="names no row: write FILE:PLACE"):
        Wanted.of(None, "web/0.jsonl")
    assert Wanted.of(None, "a:b.zst:byte 1,234 of the text behind byte 99").place == (1234, 99)


def test_more_streams_than_samples_and_steps_behind_the_newest_position(tmp_path: Path) -> None:
    """Then some steps read nothing of a stream, and where it stands at the end is read on."""
    for file in range(3):
        write(tmp_path / f"{file}.jsonl", jsonl(map(document, range(30 * file, 30 * file + 30))))
    data = data_config(source(tmp_path / "*.jsonl", "s"), streams=24)
    run = simulate(tmp_path, [Start(40, 4, data)], every=5)
    for step, path in positions_in(run.directory / RECORD).items():
        if step > 20:
            path.unlink()
    replay = open_replay(run)
    assert replay.newest == 20
    uses = Uses(replay, read_trained(run.directory / "metrics.jsonl", 1, 0))
    expected = all_uses(run)
    late = [key for key, places in expected.items() if max(places)[1] > 20]
    for key in random.Random(5).sample(late, 6):
        assert uses_of(uses, row_at(replay, key)) == expected[key]
