"""What an audit counts is what an epoch of training sees."""

import gzip
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megapipe.config import DataConfig, SourceConfig
from megapipe.data import BatchFeed, formats, frames, pieces
from megapipe.data.audit.audit import Audited, keep_records
from megapipe.data.audit.findings import problems
from megapipe.data.formats import DAMAGED
from megapipe.data.order.record import read_record
from megapipe.data.rows import Account
from megapipe.data.tokenizer import load_tokenizer
from megapipe.errors import DataError
from tests.data.audit.samples import Bytes, audited, config_of
from tests.data.odd_files import ODD_FILES, OddFile
from tests.data.samples import data_config, document, jsonl, open_feed, source, write
from tests.data.tokenizer_samples import sentencepiece_model

READABLE = [odd for odd in ODD_FILES if not odd.error and odd.empty < 1000]


@dataclass
class Seen:
    """What a feed gave of a source in the first epoch of all streams."""

    tokens: int = 0
    documents: set[tuple[str, int, int]] = field(default_factory=set)
    account: Account = field(default_factory=Account)


def first_epoch(feed: BatchFeed) -> dict[str, Seen]:
    """Reads until no stream has any of the first epoch left."""
    seen = {one.name: Seen() for one in feed.sources}
    while not all(_is_over(state) for state in _states(feed)):
        for stretches in next(feed).stretches:
            for stretch in stretches:
                row = stretch.origin
                if row.epoch == 0:
                    seen[row.source].tokens += stretch.length
                    seen[row.source].documents.add((row.file, row.unit, row.address))
    for stream in feed.state_dict()["streams"].values():
        for name, state in stream["sources"].items():
            seen[name].account.update(Account(**state.get("account", {})))
    feed.close()
    return seen


def _states(feed: BatchFeed) -> list[dict[str, object]]:
    streams = feed.state_dict()["streams"].values()
    return [state for stream in streams for state in stream["sources"].values()]


def _is_over(state: dict[str, object]) -> bool:
    document = state["document"]
    under_way = isinstance(document, list) and document[0] == 0
    return state["epoch"] != 0 and not under_way


def check(one: Audited, seen: Seen, side: int = 0) -> None:
    found = one.tally.sides[side]
    assert (found.tokens, found.documents) == (seen.tokens, len(seen.documents)), one.source.name
    assert sum(found.lengths.values()) == found.documents
    if side == 0:
        excluded = found.account.excluded_rows  # training counts them in each epoch
        assert found.account == replace(seen.account, excluded_rows=excluded)
        bad = seen.account
        rows = len(seen.documents) + bad.skipped.total() + bad.empty_rows
        assert found.rows == rows + excluded


def write_every_kind(folder: Path) -> list[SourceConfig]:
    """Sources of each kind of file, all with several units."""
    texts = [document(number) for number in range(120)]
    lines = jsonl([*texts, "", " ", None]) + b"broken\n\n[1]\n" + jsonl(["é" * 900])
    write(folder / "lines" / "a.jsonl", lines)
    write(folder / "lines" / "b.jsonl.gz", lines)
    parts = [zstandard.compress(jsonl(texts[at : at + 50])) for at in range(0, 120, 15)]
    (folder / "framed").mkdir()
    (folder / "framed" / "a.jsonl.zst").write_bytes(b"".join(parts))
    (folder / "framed" / "b.jsonl.zst").write_bytes(b"".join(parts)[:-30] + b"damage")
    whole = "".join(f"{text}\n" + "\n" * (len(text) % 5 == 0) for text in texts).encode()
    for number in range(4):
        write(folder / "text" / f"a{number}.txt", b"%d\n" % number + whole)
    (folder / "text" / "b.txt.gz").write_bytes(gzip.compress(whole)[:-12])
    (folder / "tables").mkdir()
    table = pa.table({"text": texts, "id": [f"row {number}" for number in range(120)]})
    pq.write_table(table, folder / "tables" / "a.parquet", row_group_size=30)
    with pa.ipc.new_file(folder / "tables" / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=25)
    return [
        source(folder / "lines" / "*", "jsonl"),
        source(folder / "framed" / "*", "framed"),
        source(folder / "text" / "*", "files"),
        source(folder / "text" / "a[01].txt", "lines", documents="line"),
        source(folder / "text" / "a[12].txt", "paragraphs", documents="blank-line"),
        source(folder / "tables" / "*", "tables", id_field="id"),
    ]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "UNIT_BYTES", 2 << 10)
    monkeypatch.setattr(formats, "SMALL_ARCHIVE", 1000)
    monkeypatch.setattr(frames, "FRAME_BYTES", 800)
    monkeypatch.setattr(pieces, "PIECE", 64)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_an_audit_counts_what_an_epoch_of_training_sees(tmp_path: Path, fraction: float) -> None:
    write(tmp_path / "list.jsonl", b"".join(b'{"id": "row %d"}\n' % number for number in range(30)))
    data = data_config(
        *write_every_kind(tmp_path),
        streams=3,
        validation_fraction=fraction,
        exclude=[{"path": f"{tmp_path}/list.jsonl"}],
    )
    found = audited(tmp_path, data)
    training = first_epoch(open_feed(data, global_batch_size=3, sequence_length=256))
    for one in found.sources:
        check(one, training[one.source.name])
        assert one.units > 2
    assert (found.sources[-1].training.account.excluded_rows == 60) is (not fraction)
    assert not fraction or sum(one.tally.sides[1].documents for one in found.sources) > 100
    if fraction:
        validation = first_epoch(
            open_feed(data, global_batch_size=3, sequence_length=256, validation=True)
        )
        for one in found.sources:
            check(one, validation[one.source.name], side=1)


def test_documents_are_cut_where_training_cuts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tokenizer whose tokens depend on that."""
    monkeypatch.setattr(pieces, "PIECE", 50)
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "t.model"))
    texts = ["the quick fox\n" * 9 + "runsawayandaway" * number for number in range(20)]
    data = data_config(source(write(tmp_path / "a.jsonl", jsonl(texts))), streams=2)
    (one,) = audited(tmp_path, data, tokenizer=tokenizer).sources
    check(one, first_epoch(open_feed(data, global_batch_size=2, tokenizer=tokenizer))["source"])
    uncut = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert one.training.tokens > uncut


def test_the_odd_files_of_a_corpus_are_counted_as_training_sees_them(tmp_path: Path) -> None:
    sources = []
    for number, odd in enumerate(READABLE):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        odd.make(folder)
        size = float(sum(len(text.encode()) + 1 for text in odd.documents))  # all end together
        sources.append(source(folder / odd.path, f"odd-{number}", weight=size, **odd.source))
    data = data_config(*sources, streams=2)
    found = audited(tmp_path, data)
    seen = first_epoch(
        open_feed(data, global_batch_size=2, sequence_length=256, say=lambda _: None)
    )
    for one in found.sources:
        check(one, seen[one.source.name])


@pytest.mark.parametrize("odd", ODD_FILES, ids=[odd.name for odd in ODD_FILES])
def test_every_odd_file_is_found(tmp_path: Path, odd: OddFile) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    odd.make(folder)
    data = data_config(source(folder / odd.path, **odd.source))
    if odd.error:
        assert any(
            odd.error in line or "no usable row" in line for line in _problems(tmp_path, data)
        )
        return
    (one,) = audited(tmp_path, data).sources
    account = one.training.account
    assert one.training.documents == len(odd.documents)
    assert one.training.text_bytes == sum(len(text.encode()) for text in odd.documents)
    assert one.training.tokens == one.training.text_bytes + len(odd.documents)
    assert account.skipped == Counter(odd.bad)
    assert one.tally.places.keys() == set(odd.bad)
    assert (account.empty_rows, account.skipped_bytes) == (odd.empty, odd.skipped_bytes)
    assert account.unreadable_bytes == odd.unreadable_bytes


def _problems(folder: Path, data: DataConfig) -> list[str]:
    """What an audit says of data that no run can train on: at once, or behind its tables."""
    try:
        return list(problems(audited(folder, data)))
    except DataError as error:
        return [str(error)]


@pytest.mark.usefixtures("small_units")
def test_several_processes_find_the_same(tmp_path: Path) -> None:
    data = data_config(*write_every_kind(tmp_path))
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    bar = Bytes()
    first, second = audited(one, data), audited(several, data, workers=2, bar=bar)
    for alone, together in zip(first.sources, second.sources, strict=True):
        assert alone.tally == together.tally
        assert alone.duplicates == together.duplicates
        assert alone.file_tokens == together.file_tokens
    assert bar.done == bar.total > 0
    assert list((several / "scratch").iterdir())


def test_files_that_cannot_be_read_are_all_named_and_the_others_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl(["good"]))
    write(tmp_path / "b.jsonl", b"PK\x03\x04" + bytes(30))
    write(tmp_path / "c.jsonl.gz", json.dumps([{"text": "a"}]).encode())
    (one,) = audited(tmp_path, data_config(tmp_path / "*.jsonl*")).sources
    assert one.training.documents == 1
    assert [line.partition(":")[0] for line in one.refused] == [
        f"{tmp_path}/b.jsonl",
        f"{tmp_path}/c.jsonl.gz",
    ]


def test_places_of_bad_rows_come_in_the_order_of_files(tmp_path: Path) -> None:
    for name in "ba":
        write(tmp_path / f"{name}.jsonl", jsonl(["x"]) + b"broken\n" * 70)
    (one,) = audited(tmp_path, data_config(tmp_path / "*.jsonl")).sources
    (places,) = one.tally.places.values()
    assert len(places) == 100
    assert [(place.file, place.place) for place in places[69:72]] == [
        ("a.jsonl", "byte 497"),
        ("b.jsonl", "byte 14"),
        ("b.jsonl", "byte 21"),
    ]


def test_excluded_rows_are_counted_apart(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b'{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n')
    write(tmp_path / "list.jsonl", b'{"id": 2}\n')
    data = data_config(
        source(tmp_path / "a.jsonl", id_field="id"), exclude=[{"path": f"{tmp_path}/list.jsonl"}]
    )
    (one,) = audited(tmp_path, data).sources
    assert (one.training.documents, one.training.account.excluded_rows) == (1, 1)
    assert one.training.rows == 2


def test_files_count_from_the_step_on_at_which_they_join(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", jsonl(["x" * 99]))
    data = data_config(
        source(tmp_path / "a.jsonl"),
        changes=[{"source": "source", "after_step": 10, "add": f"{tmp_path}/b.jsonl"}],
    )
    found = audited(tmp_path, data, steps=20, global_batch_size=4, sequence_length=25)
    assert found.sources[0].training.tokens == 200
    assert found.run_use.uses["source"].epochs == 10 + 5


def test_repeats_are_found_within_and_between_sources(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl(["same", "same", "other", "same"]))
    write(tmp_path / "b.jsonl", jsonl(["other", "new"]))
    write(tmp_path / "v.jsonl", jsonl(["new", "unseen"]))
    data = data_config(
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
        validation_sources=[source(tmp_path / "v.jsonl", "held-out")],
    )
    counts = [
        (one.duplicates[0].repeats, one.duplicates[0].elsewhere)
        for one in audited(tmp_path, data).sources
    ]
    assert counts == [(2, 1), (0, 1), (0, 1)]


@pytest.mark.usefixtures("small_units")
def test_the_records_save_the_first_start_a_look(tmp_path: Path) -> None:
    data = data_config(*write_every_kind(tmp_path))
    found = audited(tmp_path, data)
    keep_records(found, tmp_path / "record")
    for one in found.sources:
        record = read_record(tmp_path / "record", one.source.config)
        assert [cohort.digest for cohort in record.cohorts] == [
            cohort.digest for cohort in one.source.cohorts
        ]
    assert config_of(tmp_path, data).data == data
    assert DAMAGED in found.sources[1].tally.places
