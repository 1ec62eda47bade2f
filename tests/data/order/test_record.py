"""A checkpoint goes on with the order that made it; what differs is named, with what to write."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megapipe.data.order.record import (
    News,
    check_identity,
    identity,
    read_record,
    write_record,
)
from megapipe.data.order.timeline import Phase
from megapipe.data.sources import NO_RECORD, Change, Source, open_source
from megapipe.errors import DataError
from tests.data.samples import jsonl, source, write, write_corpus

SETTINGS: dict[str, object] = {"train.seed": 1, "data.streams": 8}
PHASES = (Phase(0, {"web": 1.0}), Phase(50, {"web": 0.5}))


def opened(
    folder: Path, name: str = "web", changes: Sequence[Change] = (), **fields: Any
) -> Source:
    config = source(folder / "*.jsonl", name, **fields)
    record = read_record(folder / "record", config)
    return open_source(config, "data.sources[0]", 8, changes=changes, record=record)


def state_of(
    *sources: Source,
    phases: Sequence[Phase] = PHASES,
    settings: Mapping[str, object] = SETTINGS,
) -> Any:
    return json.loads(json.dumps(identity(sources, phases, [[0, None, 0]], settings)))


def refused(saved: Any, own: Any, step: int = 100, news: Mapping[str, News] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        check_identity(saved, own, step, news or {})
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path, files=3, rows=5)
    return tmp_path


def test_the_same_data_goes_on(folder: Path) -> None:
    state = state_of(opened(folder))
    check_identity(state, state_of(opened(folder)), 100, {})
    moved = folder.rename(folder.with_name("elsewhere"))
    check_identity(state, state_of(opened(moved)), 100, {})


def test_settings_are_named_by_their_keys(folder: Path) -> None:
    found = opened(folder)
    tokenizer = {"data.tokenizer": f"400 tokens ({'0123456789abcdef' * 4})"}
    said = refused(
        state_of(found, settings=SETTINGS | tokenizer),
        state_of(found, settings={"train.seed": 2, "data.streams": 8, "data.tokenizer": "other"}),
    )
    assert "train.seed was 1 and is now 2; set train.seed = 1" in said
    assert "400 tokens (hash of the content: 0123456789ab)" in said
    assert "restore that" in said
    assert said.endswith("Or start a new run with another train.run_dir.")


def test_weights_of_steps_that_are_over_must_stay(folder: Path) -> None:
    found = opened(folder)
    other = (Phase(0, {"web": 1.0}), Phase(70, {"web": 0.25, "books": 0.75}))
    check_identity(state_of(found), state_of(found, phases=other), 50, {})
    said = refused(state_of(found), state_of(found, phases=other), 80)
    assert "up to step 80 its weights were" in said
    lines = said[said.index("[[data.phases]]") :].split("\n\n")[0].rpartition("}")[0] + "}"
    (phase,) = tomllib.loads(lines)["data"]["phases"]
    assert phase == {"after_step": 80, "weights": {"books": 0.75, "web": 0.25}}


def test_a_source_may_be_added_and_not_be_taken_out(folder: Path) -> None:
    web, books = opened(folder), opened(folder, "books")
    check_identity(state_of(web), state_of(books, web), 100, {})
    said = refused(state_of(books, web), state_of(web))
    assert 'the source "books" is missing; put it back. To end it, leave it out of a phase:' in said
    assert "after_step = 100" in said


def test_how_files_are_read_must_stay(folder: Path) -> None:
    said = refused(state_of(opened(folder)), state_of(opened(folder, text_field="body")))
    assert 'text_field of the source "web" was "text" and is now "body"; set it back' in said


def changed(folder: Path, what: str) -> None:
    if "new" in what:
        write(folder / "9.jsonl", jsonl(["new"]))
    if "gone" in what:
        (folder / "1.jsonl").unlink()
    if "edited" in what:
        content = bytearray((folder / "2.jsonl").read_bytes())
        content[20] ^= 1
        (folder / "2.jsonl").write_bytes(content)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("what", ["new", "gone", "new gone", "edited", "new edited"])
def test_files_that_differ_are_named_where_a_record_knows_them(
    folder: Path, what: str, recorded: bool
) -> None:
    before = opened(folder)
    saved = state_of(before)
    if recorded:
        write_record(folder / "record", before)
    changed(folder, what)
    now = opened(folder)
    record = read_record(folder / "record", now.config)
    news = {"web": News(now, record)} if recorded else {}
    said = refused(saved, state_of(now), 100, news)
    assert re.search(r'files of the source "web" were 3 files of .* and are now \d files of', said)
    if not recorded:
        assert "; restore them" in said
        return
    if "edited" in what:
        assert f"{folder}/2.jsonl changed: restore what was there" in said
        return
    change: dict[str, Any] = {"after_step": 100, "source": "web"}
    if "new" in what:
        change["add"] = str(folder / "9.jsonl")
    if "gone" in what:
        change["remove"] = str(folder / "1.jsonl")
    written = said[said.index("[[data.changes]]") :].partition("Or start")[0]
    assert tomllib.loads(written) == {"data": {"changes": [change]}}
    # What it says to write is accepted, also while the file is gone.
    declared = Change(0, 100, change.get("add"), change.get("remove"))
    check_identity(saved, state_of(opened(folder, changes=[declared])), 100, news)


def test_changes_up_to_the_step_must_stay_and_later_ones_are_free(folder: Path) -> None:
    joins = Change(0, 40, str(folder / "2.jsonl"), None)
    leaves = Change(1, 60, None, str(folder / "0.jsonl"))
    both = state_of(opened(folder, changes=[joins, leaves]))
    first = state_of(opened(folder, changes=[joins]))
    check_identity(both, first, 60, {})
    check_identity(first, both, 60, {})
    for saved, own in ((both, first), (first, both)):
        news = News(opened(folder), NO_RECORD)
        news.new = news.gone = []
        said = refused(saved, own, 61, {"web": news})
        assert "changes up to step 61 have to stay as they were" in said


def test_an_old_checkpoint_is_refused_with_one_line(folder: Path) -> None:
    own = state_of(opened(folder))
    for saved in ({"train.seed": 1, "data.shuffle_block": 8}, own | {"order": 3}):
        said = refused(saved, own)
        version = saved.get("order", 1)
        assert said.startswith(
            f"the checkpoint's data was ordered by version {version} of the rule"
        )
        assert "checkpoint.load_from" in said
        assert "\n" not in said


# --- The record beside the run -------------------------------------------------------------------


def test_a_record_knows_what_was_found(folder: Path) -> None:
    found = opened(folder, changes=[Change(0, 40, str(folder / "2.jsonl"), None)])
    write_record(folder / "record", found)
    record = read_record(folder / "record", found.config)
    assert [cohort.digest for cohort in record.cohorts] == [one.digest for one in found.cohorts]
    assert [cohort.after_step for cohort in record.cohorts] == [0, 40]
    assert all(file.rows is None for cohort in record.cohorts for file in cohort.files)


def test_a_record_of_files_that_were_read_in_another_way_is_none(folder: Path) -> None:
    found = opened(folder)
    write_record(folder / "record", found)
    for fields in ({"text_field": "body"}, {"format": "jsonl"}, {"documents": "line"}):
        other = source(folder / "*.jsonl", "web", **fields)
        assert read_record(folder / "record", other) == NO_RECORD
    assert read_record(None, found.config) == NO_RECORD
    assert read_record(folder / "elsewhere", found.config) == NO_RECORD


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"7", b'{"order": 2}', b"\xff", b'{"order":']
)
def test_a_damaged_record_is_none(folder: Path, content: bytes) -> None:
    write(folder / "record" / "web.json", content)
    assert read_record(folder / "record", source("x", "web")) == NO_RECORD
