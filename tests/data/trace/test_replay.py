"""A run is read again: every step, from positions of any layout, over changes of its data."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megapipe.data.order.record import RECORD
from megapipe.data.positions import positions_in
from megapipe.data.trace.agreement import Checked, agreement_lines, cause, check
from megapipe.data.trace.replay import Replay
from megapipe.data.trace.rows import Describer
from megapipe.data.trace.trained import read_trained
from megapipe.errors import DataError
from tests.bars import no_bar
from tests.data.samples import data_config, document, jsonl, source, write
from tests.data.trace.simulated import Simulated, Start, open_replay, simulate

EVERY = 10


def test_any_step_of_a_run_is_read_again_bitwise(run: Simulated) -> None:
    """With a phase, files that come and go, and rows excluded in two later starts, each of which
    had another number of replicas."""
    replay = open_replay(run)
    trained = read_trained(run.directory / "metrics.jsonl", 1, 500)
    assert (trained.last, len(trained.hashes)) == (500, 500)
    for number in random.Random(1).sample(range(1, 501), 50):
        steps = list(replay.read(number, number, no_bar))
        assert len(steps) <= EVERY
        batch, parts = steps[-1].batch, run.steps[number]
        tokens = {
            sample: row
            for part in parts
            for sample, row in zip(part.samples, part.tokens, strict=True)
        }
        assert list(batch.samples) == sorted(tokens) == list(range(8 * number - 8, 8 * number))
        assert np.array_equal(batch.tokens, [tokens[sample] for sample in batch.samples])
        assert agreement_lines([check(steps[-1], trained.hashes)]) == [
            f"step {number}: equal to what was trained"
        ]
    replay.feed.close()


def test_a_step_says_which_rows_it_is_of(run: Simulated) -> None:
    replay = open_replay(run)
    steps = list(replay.read(201, 210, no_bar))
    describer = Describer(replay.feed.sources, replay.feed.tokenizer)
    samples = [sample for step in steps for sample in describer.samples(step)]
    assert [sample.place for sample in samples] == 10 * list(range(1, 9))
    assert [sample.number for sample in samples] == list(range(1600, 1680))
    whole = [row for sample in samples for row in sample.rows if row.part == "whole"]
    assert {row.source for row in whole} == {"web", "books", "packed", "notes"}
    for row in whole:
        assert row.text is not None
        if row.id is not None:
            assert row.text == document(int(row.id.removeprefix("id-")))
        if row.source == "web":
            line = Path(row.file).read_bytes()[int(row.place.split()[1].replace(",", "")) :]
            assert json.loads(line.splitlines()[0]) == {"id": row.id, "text": row.text}
        assert (row.id is None) == (row.source == "notes")


def test_a_change_that_no_fingerprint_shows_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapipe.data.sources.fingerprint", lambda path, size: "same")
    for file in "ab":
        write(tmp_path / f"{file}.jsonl", jsonl(map(document, range(50))))
    data = data_config(source(tmp_path / "*.jsonl", "s"), streams=8)
    run = simulate(tmp_path, [Start(20, 2, data)], every=10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(path.read_bytes().replace(b"25:bbbb", b"25:bxbb"))
    replay = open_replay(run)
    trained = read_trained(run.directory / "metrics.jsonl", 1, 20)
    checked = [check(step, trained.hashes) for step in replay.read(1, 20, no_bar)]
    differs = [one for one in checked if one.hash != one.trained]
    assert differs
    said = cause(differs[0], replay, Describer(replay.feed.sources))
    assert f"Of the files that it read, {path} changed after it was trained" in said
    assert "b.jsonl" not in said
    replay.feed.close()


def test_a_change_that_shows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(map(document, range(50))))
    data = data_config(source(path, "s"), streams=8)
    run = simulate(tmp_path, [Start(4, 1, data)], every=2)
    path.write_bytes(path.read_bytes().replace(b"25:bbbb", b"25:bxbb"))
    with pytest.raises(DataError, match=f"{path} changed: restore what was there"):
        open_replay(run)
    for position in positions_in(run.directory / RECORD).values():
        position.unlink()
    with pytest.raises(DataError, match=r"run/data-record has no position in the data"):
        open_replay(run)


def test_steps_that_a_run_has_not_are_named(run: Simulated, tmp_path: Path) -> None:
    replay: Replay = open_replay(run)
    with pytest.raises(DataError, match="step 0 was not trained by this run"):
        replay.before(0)
    lines = [
        {"step": 1, "batch_hash": "old"},
        {"step": 1, "epoch": 3, "batch_hash": "new"},
        {"step": 2, "epoch": 4},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ba')
    trained = read_trained(path, 1, 9)
    assert (trained.hashes, trained.last, trained.epoch) == ({1: "new"}, 2, 4)
    checked = [
        Checked(1, "new", "new"),
        Checked(2, "x", None),
        Checked(3, "x", "y"),
    ]
    assert agreement_lines(checked) == [
        "step 1: equal to what was trained",
        "step 2: not in metrics.jsonl",
        "step 3: DIFFERS from what was trained (hash x, trained y)",
    ]
