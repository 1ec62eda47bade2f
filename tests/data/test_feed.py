import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapipe.config import DataConfig
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
    write_corpus(directory / "b", files=1, rows=7, start=1000)
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
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
