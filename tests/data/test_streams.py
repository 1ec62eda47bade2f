import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapipe.config import SourceConfig
from megapipe.data import streams
from megapipe.data.blend import Blend
from megapipe.data.blocks import BlockReader
from megapipe.data.rows import Account, BadRows
from megapipe.data.sources import Keeps, open_source
from megapipe.data.streams import DocumentStream, SourceStream
from megapipe.data.tokenizer import Tokenizer, load_tokenizer
from megapipe.errors import DataError
from tests.data.samples import ByteTokenizer, document, jsonl, texts_of, write
from tests.data.tokenizer_samples import sentencepiece_model

STREAMS = 3


def every(file: int, row: int) -> bool:
    return True


def build(
    *paths: Path,
    stream: int = 0,
    keeps: Keeps = every,
    limit: int = 1000,
    block_rows: int = 4,
    tokenizer: Tokenizer | None = None,
) -> DocumentStream:
    bad = BadRows(limit, lambda _: None)
    parts = []
    for index, path in enumerate(paths):
        source = open_source(SourceConfig(path=str(path)), f"data.sources[{index}]", STREAMS)
        reader = BlockReader(
            source,
            block_rows=block_rows,
            streams=STREAMS,
            hosted=frozenset({stream}),
            seed=5,
        )
        encoder = tokenizer or ByteTokenizer()
        parts.append(SourceStream(reader, stream, tokenizer=encoder, keeps=keeps, bad_rows=bad))
    return DocumentStream(parts, Blend([1.0] * len(paths), stream))


def take(stream: DocumentStream, count: int, limit: int = 1 << 30) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += stream.read(min(limit, count - len(tokens)))[0].tolist()
    return tokens


def first_epoch(make: Callable[[int], DocumentStream]) -> list[str]:
    """Documents that all streams read before their second epoch."""
    found: list[str] = []
    for index in range(STREAMS):
        stream = make(index)
        while True:
            tokens, begins = stream.read(1 << 30)
            if stream.epochs[0] > 0:
                break
            assert begins
            found += texts_of(tokens.tolist())
    return found


def test_streams_together_read_each_document_once_in_an_epoch(tmp_path: Path) -> None:
    texts = [document(number) for number in range(50)]
    path = write(tmp_path / "a.jsonl", jsonl(texts))
    found = first_epoch(lambda index: build(path, stream=index))
    assert Counter(found) == Counter(texts)
    assert found != texts


def test_pieces_go_on_with_the_same_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {n} é\n" for n in range(200)) + "x" * 100
    path = write(tmp_path / "a.jsonl", jsonl([text]))
    monkeypatch.setattr(streams, "PIECE", 64)
    stream = build(path)
    tokens, flags = [], []
    while not tokens or tokens[-1] != 0:
        part, begins = stream.read(50)
        tokens += part.tolist()
        flags.append(begins)
    assert texts_of(tokens) == [text]
    assert flags == [True] + [False] * (len(flags) - 1)


def test_pieces_get_no_space_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that puts a space before a text does so before the document only."""
    text = "the quick fox\n" * 20 + "runsawayandaway" * 20
    path = write(tmp_path / "a.jsonl", jsonl([text]))
    tokenizer = load_tokenizer(
        sentencepiece_model(
            tmp_path / "t.model",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
    )
    monkeypatch.setattr(streams, "PIECE", 64)
    whole = take(build(path, tokenizer=tokenizer), 600)
    end = whole.index(tokenizer.end_of_document)
    assert tokenizer.decode(whole[:end]) == text
    for before in (1, 17, 40, 100):
        one, other = build(path, tokenizer=tokenizer), build(path, tokenizer=tokenizer)
        take(one, before)
        other.load(json.loads(json.dumps(one.state())))
        assert take(other, 50) == whole[before : before + 50]


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 3000), st.integers(1, 90), st.integers(0, STREAMS - 1))
def test_the_state_is_exact_at_every_position(
    tmp_path: Path, before: int, limit: int, index: int
) -> None:
    if not (tmp_path / "b.jsonl").exists():
        write(tmp_path / "a.jsonl", jsonl(document(n) for n in range(20)) + b"broken\n")
        write(tmp_path / "b.jsonl", jsonl([document(n) * 9 for n in range(100, 107)] + [""]))
    paths = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "PIECE", 100)
        one = build(*paths, stream=index)
        take(one, before, limit)
        state: dict[str, Any] = json.loads(json.dumps(one.state()))
        other = build(*paths, stream=index)
        other.load(state)
        assert other.state() == one.state()
        assert take(other, 500) == take(one, 500)
        assert other.state() == one.state()


def test_bad_rows_are_skipped_counted_once_and_kept_in_the_state(tmp_path: Path) -> None:
    rows = b"{broken\n" + jsonl(["one", "", "two"]) + b'{"text": "\xff"}\n' + jsonl(["three"])
    path = write(tmp_path / "a.jsonl", rows)

    def stream(index: int) -> DocumentStream:
        return build(path, stream=index, block_rows=1)

    assert sorted(first_epoch(stream)) == ["one", "three", "two"]
    account = Account()
    for index in range(STREAMS):
        one = stream(index)
        take(one, 1000)
        assert one.epochs[0] > 5
        account.update(Account(**one.state()["sources"][0]["account"]))
    assert account.skipped == Counter({"malformed JSON": 1, "not UTF-8": 1})
    assert account.skipped_bytes == len(b"{broken\n") + len(b'{"text": "\xff"}\n')
    assert (account.empty_rows, account.unreadable_bytes) == (1, 0)


def test_bad_rows_above_the_limit_stop_with_file_and_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(["one", "two"]) + b"[1]\n" + jsonl(["three"]))
    with pytest.raises(DataError, match=r"a\.jsonl, row 3: not a JSON object.*max_bad_rows = 0"):
        [take(build(path, stream=index, limit=0), 100) for index in range(STREAMS)]


def test_rows_of_the_other_split_are_left_out(tmp_path: Path) -> None:
    texts = [document(number) for number in range(30)]
    path = write(tmp_path / "a.jsonl", jsonl(texts))
    even = first_epoch(lambda i: build(path, stream=i, keeps=lambda file, row: row % 2 == 0))
    odd = first_epoch(lambda i: build(path, stream=i, keeps=lambda file, row: row % 2 == 1))
    assert sorted(even) == sorted(texts[::2])
    assert sorted(odd) == sorted(texts[1::2])


def test_damage_of_a_file_counts_in_both_splits(tmp_path: Path) -> None:
    """Nobody knows to which of them the rows belong that can't be read."""
    whole = gzip.compress(jsonl([document(number) for number in range(9)]), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole + b"not gzip")
    for even in (True, False):
        lost = 0
        for index in range(STREAMS):
            stream = build(
                path, stream=index, keeps=lambda file, row, even=even: (row % 2 == 0) is even
            )
            take(stream, 5000)
            lost += stream.state()["sources"][0]["account"]["unreadable_bytes"]
        assert lost == len(b"not gzip")


def test_a_position_is_small(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(["x" * 1_000_000] * 3))
    stream = build(path)
    take(stream, 1_400_000)
    assert len(json.dumps(stream.state())) < 300
