import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapipe.config import DataConfig
from megapipe.config.data import ChangeConfig, PhaseConfig
from megapipe.data import Batch, BatchFeed, merge_states
from megapipe.data.feed import State
from megapipe.data.rows import Account
from megapipe.errors import DataError
from tests.data.samples import (
    ByteTokenizer,
    data_config,
    digest,
    document,
    jsonl,
    open_feed,
    source,
    texts_of,
    write,
    write_corpus,
)

GLOBAL_BATCH = 8


def blended(directory: Path) -> DataConfig:
    """Two sources with bad rows, so small that 50 steps are many epochs of one of them."""
    write_corpus(directory / "a", files=3, rows=60)
    write_corpus(directory / "b", files=1, rows=30, start=1000)
    write(directory / "a" / "bad.jsonl", b"{\n" + jsonl(["", "good"]))
    return data_config(
        source(directory / "a" / "*.jsonl", "a", weight=3.0),
        source(directory / "b" / "*.jsonl", "b", weight=1.0),
        open_parts=16,
        streams=8,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return blended(tmp_path_factory.mktemp("corpus"))


def open_all(config: DataConfig, size: int, state: State | None = None) -> list[BatchFeed]:
    feeds = [open_feed(config, rank, size) for rank in range(size)]
    for feed in feeds if state else ():
        feed.load_state_dict(json.loads(json.dumps(state)))
    return feeds


def passes(feed: BatchFeed, name: str) -> list[int]:
    """How many passes over a source each stream has ended."""
    return [part["sources"][name]["epoch"] for part in feed.state_dict()["streams"].values()]


def hashes(feeds: Sequence[BatchFeed], steps: int) -> list[str]:
    return [digest([next(feed) for feed in feeds]) for _ in range(steps)]


def close(feeds: Sequence[BatchFeed]) -> None:
    for feed in feeds:
        feed.close()


@pytest.fixture(scope="module")
def expected(config: DataConfig) -> list[str]:
    """Hashes of steps 0 to 49 read by one rank."""
    feeds = open_all(config, 1)
    found = hashes(feeds, 50)
    close(feeds)
    assert len(set(found)) == 50
    return found


@pytest.mark.parametrize("size", [2, 4, 8])
def test_tokens_are_the_same_at_every_data_size(
    config: DataConfig, expected: list[str], size: int
) -> None:
    feeds = open_all(config, size)
    assert hashes(feeds, 50) == expected
    close(feeds)


@settings(deadline=None, max_examples=15)
@given(
    stops=st.lists(st.integers(0, 49), min_size=1, max_size=3).map(sorted),
    sizes=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=4, max_size=4),
)
def test_resume_at_any_step_and_another_data_size_gives_the_same_tokens(
    config: DataConfig, expected: list[str], stops: list[int], sizes: list[int]
) -> None:
    state: State | None = None
    found: list[str] = []
    for stop, size in zip([*stops, 50], sizes, strict=False):
        feeds = open_all(config, size, state)
        found += hashes(feeds, stop - len(found))
        state = merge_states([feed.state_dict() for feed in feeds])
        assert state["step"] == stop
        close(feeds)
    assert found == expected


def test_the_merged_state_does_not_depend_on_the_data_size(config: DataConfig) -> None:
    states = []
    for size in (1, 4):
        feeds = open_all(config, size)
        hashes(feeds, 5)
        states.append(merge_states([feed.state_dict() for feed in feeds]))
        close(feeds)
    assert states[0] == states[1]
    assert list(states[0]["streams"]) == [str(stream) for stream in range(8)]


def test_more_samples_than_streams_and_fewer(tmp_path: Path) -> None:
    write_corpus(tmp_path, files=2, rows=50)
    config = data_config(tmp_path / "*.jsonl", streams=4)
    for batch in (4, 12, 20):
        one = open_feed(config, global_batch_size=batch)
        two = [open_feed(config, rank, 2, global_batch_size=batch) for rank in range(2)]
        assert hashes([one], 10) == hashes(two, 10)
        close([one, *two])


def test_a_feed_is_opened_again_by_loading_a_state(config: DataConfig, expected: list[str]) -> None:
    feed = open_feed(config)
    start = feed.state_dict()
    assert hashes([feed], 3) == expected[:3]
    feed.load_state_dict(start)
    assert hashes([feed], 3) == expected[:3]
    feed.close()
    with pytest.raises(AssertionError, match="closed"):
        next(feed)


def test_a_batch_that_is_taken_back_is_given_again(config: DataConfig, expected: list[str]) -> None:
    feeds = open_all(config, 2)
    hashes(feeds, 3)
    before = merge_states([feed.state_dict() for feed in feeds])
    next(feeds[0])  # the other reader fails, say
    feeds[0].take_back()
    state = merge_states([feed.state_dict() for feed in feeds])
    assert state == before
    close(feeds)
    again = open_all(config, 1, state)
    assert hashes(again, 2) == expected[3:5]
    close(again)


def test_seed_and_streams_choose_the_order(config: DataConfig, expected: list[str]) -> None:
    other = open_feed(config, seed=2)
    fewer = open_feed(config.model_copy(update={"streams": 4}))
    assert hashes([other], 1)[0] != expected[0]
    assert hashes([fewer], 1)[0] != expected[0]
    close([other, fewer])


def test_nothing_is_lost_between_the_sequences_of_a_stream(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path, files=4, rows=50)
    feed = open_feed(data_config(tmp_path / "*.jsonl"))
    streams: list[list[int]] = [[] for _ in range(4)]
    while feed.epoch == 0:
        batch = next(feed)
        for sample, tokens in enumerate(batch.tokens):
            stream = streams[sample % 4]
            assert not stream or stream[-1] == tokens[0]
            stream += tokens[1 if stream else 0 :].tolist()
    feed.close()
    counts = Counter(text for stream in streams for text in texts_of(stream))
    assert set(counts) <= set(texts)
    assert len(counts) > 150


def test_documents_number_the_inputs(config: DataConfig) -> None:
    feed = open_feed(config)
    batch = next(feed)
    feed.close()
    assert batch.tokens.shape == (8, 33)
    assert batch.documents.shape == (8, 32)
    assert batch.tokens.dtype == batch.documents.dtype == np.int32
    ends = batch.tokens[:, :-1] == 0
    assert (np.diff(batch.documents, axis=1) == ends[:, :-1]).all()


def test_the_blend_is_met_in_tokens(config: DataConfig) -> None:
    feed = open_feed(config, sequence_length=64)
    for _ in range(40):
        next(feed)
    state = feed.state_dict()
    feed.close()
    taken = np.sum(
        [[part["sources"][name]["tokens"] for name in "ab"] for part in state["streams"].values()],
        axis=0,
    )
    assert taken[0] / taken.sum() == pytest.approx(0.75, abs=0.02)


def test_bad_rows_are_counted_and_said_and_counts_survive_a_resume(config: DataConfig) -> None:
    said: list[str] = []
    feed = open_feed(config, say=said.append)
    while min(passes(feed, "a")) < 2:  # the second pass meets the bad rows again
        next(feed)
    expected = Account(Counter({"malformed JSON": 1}), skipped_bytes=2, empty_rows=1)
    assert feed.account == expected
    assert [line.split("/")[-1] for line in said] == ["bad.jsonl, byte 0: skipped: malformed JSON"]
    state = feed.state_dict()
    feed.load_state_dict(state)
    next(feed)
    assert feed.account == expected
    feed.close()


def test_an_error_of_the_thread_is_raised_by_the_step_that_needs_the_row(tmp_path: Path) -> None:
    texts = [document(number) for number in range(100)]
    path = write(tmp_path / "a.jsonl", jsonl(texts) + b"{\n" + jsonl(texts))
    fields = {"streams": 1, "open_parts": 1}
    lenient = open_feed(data_config(path, **fields), global_batch_size=1)
    steps = 0
    while lenient.account.skipped.total() == 0:
        next(lenient)
        steps += 1
    lenient.close()
    assert steps > 5
    feed = open_feed(data_config(path, **fields, max_bad_rows=0), global_batch_size=1)
    for _ in range(steps - 1):
        next(feed)
    place = len(jsonl(texts))
    for _ in range(2):
        with pytest.raises(DataError, match=rf"a\.jsonl, byte {place:,}: malformed JSON"):
            list(islice(feed, 3))
    feed.close()


class SlowTokenizer(ByteTokenizer):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.threads: set[str] = set()

    def encode(self, text: str) -> list[int]:
        time.sleep(self.seconds)
        self.threads.add(threading.current_thread().name)
        return super().encode(text)


def test_a_step_does_not_wait_while_batches_are_made_ahead(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl("x" * 300 for _ in range(50)))
    tokenizer = SlowTokenizer(0.02)
    feed = open_feed(data_config(path, streams=1), tokenizer=tokenizer, global_batch_size=8)
    next(feed)
    waits = []
    for _ in range(5):
        time.sleep(0.1)  # a step; a batch takes 0.02 s to make
        next(feed)
        waits.append(feed.wait_seconds)
    assert max(waits) < 0.01
    assert tokenizer.threads == {"data"}
    feed.close()
    assert "data" not in {thread.name for thread in threading.enumerate()}


def test_no_more_than_prefetch_batches_are_made_ahead(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl("x" * 31 for _ in range(1000)))
    tokenizer = SlowTokenizer(0.0)
    calls: list[int] = []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: calls.append(1) or encode(text)  # type: ignore[method-assign, func-returns-value]
    feed = open_feed(
        data_config(path, streams=1, prefetch=3), tokenizer=tokenizer, global_batch_size=1
    )
    next(feed)
    time.sleep(0.2)
    assert len(calls) <= 1 + 3 + 2
    feed.close()


def validation_batches(config: DataConfig, size: int = 1, **fields: object) -> list[Batch]:
    feeds = [open_feed(config, rank, size, validation=True, **fields) for rank in range(size)]
    found = [next(feed) for feed in feeds]
    close(feeds)
    return found


def test_validation_rows_are_never_trained_on(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path, files=4, rows=100)
    config = data_config(tmp_path / "*.jsonl", validation_fraction=0.2, streams=1)
    found: list[set[str]] = []
    for validation in (False, True):
        feed = open_feed(config, validation=validation, global_batch_size=1)
        tokens: list[int] = []
        while feed.epoch == 0:
            tokens += next(feed).tokens[0, :-1].tolist()
        found.append(set(texts_of(tokens)))
        feed.close()
    train, validation_texts = found
    assert not train & validation_texts
    assert len(train | validation_texts) >= len(texts) - 2
    assert 50 <= len(validation_texts) <= 110


def test_validation_batches_are_the_same_in_every_layout(config: DataConfig) -> None:
    split = config.model_copy(update={"validation_fraction": 0.1})
    own = data_config(*config.sources, validation_sources=config.sources[1:], streams=8)
    for chosen in (split, own):
        one = digest(validation_batches(chosen))
        assert digest(validation_batches(chosen)) == one
        assert digest(validation_batches(chosen, size=4)) == one


def test_validation_without_text_and_a_fraction_that_picks_nothing(config: DataConfig) -> None:
    with pytest.raises(DataError, match=r"data\.validation_sources.*data\.validation_fraction"):
        open_feed(config, validation=True)
    tiny = config.model_copy(update={"validation_fraction": 1e-9})
    with pytest.raises(
        DataError, match=r"validation_fraction leaves nothing of data\.sources\[0\]"
    ):
        open_feed(tiny, validation=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streams": 16}, "data.streams was 8 and is now 16"),
        ({"open_parts": 9}, "data.open_parts was 16 and is now 9"),
        ({"validation_fraction": 0.5}, "data.validation_fraction was 0.0 and is now 0.5"),
        ({"sources": 1}, 'the source "b" is missing; put it back'),
    ],
)
def test_a_state_of_other_data_is_refused(
    config: DataConfig, change: dict[str, object], message: str
) -> None:
    feed = open_feed(config)
    state = feed.state_dict()
    if "sources" in change:
        change = {"sources": config.sources[:1]}
    other = open_feed(config.model_copy(update=change))
    with pytest.raises(DataError) as caught:
        other.load_state_dict(state)
    assert message in str(caught.value)
    close([feed, other])


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.integers(1, 40), streams=st.sampled_from([1, 2, 8, 16]), parts=st.integers(1, 50))
def test_no_stream_starves_in_a_small_source(
    tmp_path: Path, rows: int, streams: int, parts: int
) -> None:
    write_corpus(tmp_path, files=1, rows=rows)
    config = data_config(tmp_path / "0.jsonl", streams=streams, open_parts=parts)
    feed = open_feed(config, global_batch_size=streams)
    batches = [next(feed) for _ in range(3)]
    feed.close()
    assert all(batch.tokens.shape == (streams, 33) for batch in batches)
    if rows >= 4 * streams:  # then each stream has four of them in every epoch
        for stream in range(streams):
            read = [stretch for batch in batches for stretch in batch.stretches[stream]]
            begun = [stretch.origin.epoch for stretch in read if stretch.begins]
            assert begun[:4] == [0] * len(begun[:4])


# --- What a batch says of itself -----------------------------------------------------------------


def test_the_hash_of_a_batch_is_the_sum_of_its_parts(config: DataConfig) -> None:
    one, four = open_all(config, 1), open_all(config, 4)
    found = []
    for _ in range(5):
        (whole,) = [next(feed) for feed in one]
        assert whole.hash == sum(next(feed).hash for feed in four) % 2**64
        expected = sum(
            xxhash.xxh3_64_intdigest(b"".join(int(t).to_bytes(4, "little") for t in row), sample)
            for sample, row in zip(whole.samples, whole.tokens, strict=True)
        )
        assert whole.hash == expected % 2**64
        found.append(whole.hash)
    assert len(set(found)) == 5
    close([*one, *four])


def test_stretches_say_which_row_each_token_is_of(config: DataConfig) -> None:
    folder = {source.name: Path(source.path).parent for source in config.sources}
    feed = open_feed(config)
    for _ in range(20):
        batch = next(feed)
        for tokens, stretches in zip(batch.tokens, batch.stretches, strict=True):
            assert sum(stretch.length for stretch in stretches) in (32, 33)
            for start, length, begins, _, _, origin, _ in stretches:
                content = (folder[origin.source] / origin.file).read_bytes()
                row = content[origin.address : content.index(b"\n", origin.address)]
                text = [*ByteTokenizer().encode(json.loads(row)["text"]), 0]
                part = tokens[start : start + length].tolist()
                places = [0] if begins else range(1, len(text))
                assert any(text[place : place + length] == part for place in places)
    feed.close()


def test_samples_are_counted_through_changes_of_the_batch(config: DataConfig) -> None:
    """A stage of another batch size goes on with the next sample."""
    feed = open_feed(config)
    expected = np.concatenate([next(feed).tokens for _ in range(11)])
    feed.close()
    state, found = None, []
    for batch, steps, size in ((8, 3, 2), (24, 2, 1), (16, 1, 4)):
        feeds = [open_feed(config, rank, size, global_batch_size=batch) for rank in range(size)]
        for one in feeds:
            if state is not None:
                one.load_state_dict(state)
        for _ in range(steps):
            parts = [next(one) for one in feeds]
            rows = {n: row for p in parts for n, row in zip(p.samples, p.tokens, strict=True)}
            assert sorted(rows) == list(range(len(found), len(found) + batch))
            found += [rows[number] for number in sorted(rows)]
        state = merge_states([one.state_dict() for one in feeds])
        assert state["sample"] == len(found)
        close(feeds)
    assert np.array_equal(np.stack(found), expected)


# --- Names, phases and changes -------------------------------------------------------------------


def per_source(batches: Sequence[Batch]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for batch in batches:
        for stretch in (stretch for sample in batch.stretches for stretch in sample):
            counts[stretch.origin.source] += stretch.length
    return counts


def stories(batches: Sequence[Batch], name: str) -> list[list[tuple[str, int, int]]]:
    """The rows of a source that each of 8 streams begins, in order."""
    rows: list[list[tuple[str, int, int]]] = [[] for _ in range(8)]
    for batch in batches:
        for sample, stretches in zip(batch.samples, batch.stretches, strict=True):
            for stretch in stretches:
                if stretch.begins and stretch.origin.source == name:
                    rows[sample % 8].append(stretch.origin[1:4])
    return rows


def batches_of(config: DataConfig, steps: int, **fields: Any) -> list[Batch]:
    feed = open_feed(config, **fields)
    found = [next(feed) for _ in range(steps)]
    feed.close()
    return found


def test_the_order_of_a_source_is_its_own(tmp_path: Path, config: DataConfig) -> None:
    """A source in front of the others, or other weights, change neither its rows nor its split."""
    write_corpus(tmp_path, files=1, rows=30, start=2000)
    more = config.model_copy(
        update={"sources": (source(tmp_path / "0.jsonl", "new", weight=2.0), *config.sources[::-1])}
    )
    for fields in ({}, {"validation_fraction": 0.2}):
        split = [one.model_copy(update=fields) for one in (config, more)]
        for validation in (False, True) if fields else (False,):
            found = [batches_of(one, 15, validation=validation) for one in split]
            for name in "ab":
                one, other = (stories(batches, name) for batches in found)
                for rows, others in zip(one, other, strict=True):
                    shorter = min(len(rows), len(others))
                    assert shorter > 0
                    assert rows[:shorter] == others[:shorter]


def phased(config: DataConfig) -> DataConfig:
    phases = (
        PhaseConfig(after_step=20, weights={"a": 1.0, "b": 4.0}),
        PhaseConfig(after_tokens=45 * 8 * 32 - 5, weights={"a": 1.0}),
        PhaseConfig(after_step=60, weights={"a": 1.0, "b": 1.0}),
    )
    return config.model_copy(update={"phases": phases})


def test_each_phase_has_its_weights_from_its_first_step_on(config: DataConfig) -> None:
    """Within every window of 20 steps, to a point and a document per stream."""
    batches = batches_of(phased(config), 90)
    starts = {0: 0.75, 20: 0.2, 45: 1.0, 60: 0.5, 90: 0.0}
    for (start, share), end in zip(starts.items(), [20, 45, 60, 90], strict=False):
        for first in range(start, end - 19):
            counts = per_source(batches[first : first + 20])
            documents = 8 * 62  # of 8 streams; the longest has 61 characters
            assert abs(counts["a"] - share * counts.total()) < 0.01 * counts.total() + documents
    quiet = per_source(batches[48:60])
    assert quiet["b"] == 0, "it rests, once the documents under way have ended"


@pytest.mark.parametrize("changing", ["phases", "files"])
def test_phases_and_changes_are_the_same_in_every_layout_and_over_stops(
    tmp_path: Path, config: DataConfig, changing: str
) -> None:
    chosen = phased(config) if changing == "phases" else changed(tmp_path)
    feeds = open_all(chosen, 1)
    expected = hashes(feeds, 80)
    close(feeds)
    found: list[str] = []
    state: State | None = None
    for stop, size in ((19, 2), (20, 4), (21, 1), (45, 8), (61, 2), (80, 1)):
        feeds = open_all(chosen, size, state)
        found += hashes(feeds, stop - len(found))
        state = merge_states([feed.state_dict() for feed in feeds])
        close(feeds)
    assert found == expected


def changed(directory: Path) -> DataConfig:
    """Three files, of which one leaves behind step 20; two join behind 20 and 45, and one of them
    leaves behind 61."""
    folder = directory / "text"
    write_corpus(folder, files=5, rows=60)
    changes = (
        ChangeConfig(after_step=20, source="a", add=str(folder / "3.jsonl")),
        ChangeConfig(after_step=20, source="a", remove=str(folder / "0.jsonl")),
        ChangeConfig(after_step=45, source="a", add=str(folder / "4.jsonl")),
        ChangeConfig(after_step=61, source="a", remove=str(folder / "3.jsonl")),
    )
    return data_config(
        source(folder / "*.jsonl", "a"), changes=changes, streams=8, validation_fraction=0.1
    )


def test_files_join_and_leave_at_their_steps(tmp_path: Path) -> None:
    config = changed(tmp_path)
    batches = batches_of(config, 120)
    read = [
        {stretch.origin.file for sample in batch.stretches for stretch in sample}
        for batch in batches
    ]

    def between(first: int, last: int) -> set[str]:
        return set().union(*read[first:last])

    names = [f"{number}.jsonl" for number in range(5)]
    assert between(0, 20) == {names[0], names[1], names[2]}
    assert between(21, 45) == {names[1], names[2], names[3]}
    assert between(62, 120) == {names[1], names[2], names[4]}
    rows = Counter(
        (stretch.origin.file, stretch.origin.address)
        for batch in batches
        for sample in batch.stretches
        for stretch in sample
        if stretch.begins and stretch.origin.epoch == 0
    )
    assert max(rows.values()) == 1, "none twice within the epoch"
    stayed = config.model_copy(update={"changes": ()})
    sides = [batches_of(one, 60, validation=True) for one in (config, stayed)]
    held = [
        {stretch.origin[1:4] for batch in side for sample in batch.stretches for stretch in sample}
        for side in sides
    ]
    trained = {
        stretch.origin[1:4] for batch in batches for sample in batch.stretches for stretch in sample
    }
    assert not trained & held[1], "what is set aside does not depend on the changes"
    assert held[0] < held[1]


# --- Records and checkpoints ---------------------------------------------------------------------


def test_the_record_of_a_run_is_written_by_its_first_reader(
    tmp_path: Path, config: DataConfig
) -> None:
    folder = tmp_path / "run" / "data"
    for rank in (1, 0):
        assert not folder.exists()
        feed = open_feed(config, rank, 2, record=folder)
        next(feed)
        feed.close()
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]


def test_nothing_depends_on_the_record(
    tmp_path: Path, config: DataConfig, expected: list[str]
) -> None:
    for damage in (None, b"", b"{}", b'{"order": 2, "cohorts": 5}', b"[]"):
        feed = open_feed(config, record=tmp_path)
        assert hashes([feed], 5) == expected[:5]
        feed.close()
        if damage is not None:
            (tmp_path / "a.json").write_bytes(damage)


def test_a_checkpoint_of_the_old_order_is_refused_in_one_line(config: DataConfig) -> None:
    feed = open_feed(config)
    state = feed.state_dict()
    old = {"train.seed": 1, "data.streams": 8, "data.shuffle_block": 8}
    with pytest.raises(DataError) as caught:
        feed.load_state_dict({"step": 2, "identity": old, "streams": state["streams"]})
    feed.close()
    said = str(caught.value)
    assert "\n" not in said
    assert "version 1 of the rule, and this megapipe has version 2" in said
    assert "checkpoint.load_from" in said
