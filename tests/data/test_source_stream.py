import gzip
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapipe.config import SourceConfig
from megapipe.data import pieces, source_stream
from megapipe.data.document_stream import DocumentStream
from megapipe.data.order.rows import RowStore
from megapipe.data.order.source_order import SourceOrder
from megapipe.data.rows import Account, BadRows
from megapipe.data.source_stream import SourceStream
from megapipe.data.sources import Change, Keeps, open_source
from megapipe.data.tokenizer import Tokenizer, load_tokenizer
from megapipe.errors import DataError
from tests.data.samples import ByteTokenizer, document, jsonl, source, texts_of, write
from tests.data.tokenizer_samples import sentencepiece_model

STREAMS = 3


def every(file: str, unit: int, address: int) -> bool:
    return True


def build(
    *paths: Path | SourceConfig,
    stream: int = 0,
    streams: int = STREAMS,
    keeps: Keeps = every,
    limit: int = 1000,
    open_parts: int = 64,
    tokenizer: Tokenizer | None = None,
    changes: Sequence[Change] = (),
) -> DocumentStream:
    """One stream of several that blend the sources "a", "b", ... in equal shares, at its start."""
    bad = BadRows(limit, lambda _: None)
    parts = {}
    for name, path in zip("abc", paths, strict=False):
        config = path if isinstance(path, SourceConfig) else source(path, name)
        found = open_source(config, f"data.sources[{len(parts)}]", streams, changes=changes)
        order = SourceOrder(
            found,
            seed=5,
            streams=streams,
            open_parts=open_parts,
            max_epochs=config.max_epochs,
            store=RowStore(64),
        )
        encoder = tokenizer or ByteTokenizer()
        parts[name] = SourceStream(order, stream, tokenizer=encoder, keeps=keeps, bad_rows=bad)
    one = DocumentStream(parts, stream)
    one.begin(0, {name: 1 / len(parts) for name in parts})
    return one


WEIGHTS = {1: {"a": 1.0}, 2: {"a": 0.5, "b": 0.5}}


def resumed(
    state: Any, *paths: Path | SourceConfig, step: int = 1, **fields: Any
) -> DocumentStream:
    """A stream that goes on from a state, as it comes out of a checkpoint."""
    other = build(*paths, **fields)
    other.load(json.loads(json.dumps(state)), step, WEIGHTS[len(paths)])
    return other


def take(stream: DocumentStream, count: int, limit: int = 1 << 30) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += stream.read(min(limit, count - len(tokens))).tokens.tolist()
    return tokens


def pass_of(make: Callable[[int], DocumentStream], epoch: int = 0) -> list[str]:
    """Documents that all streams read in an epoch, stream by stream."""
    found: list[str] = []
    for index in range(STREAMS):
        stream = make(index)
        while True:
            part = stream.read(1 << 30)
            assert part.begins
            assert part.ends
            if part.origin.epoch > epoch:
                break
            found += texts_of(part.tokens.tolist()) if part.origin.epoch == epoch else []
    return found


def test_streams_together_read_each_document_once_in_an_epoch(tmp_path: Path) -> None:
    texts = [document(number) for number in range(50)]
    path = write(tmp_path / "a.jsonl", jsonl(texts))
    passes = [pass_of(lambda index: build(path, stream=index), epoch) for epoch in range(3)]
    for found in passes:
        assert Counter(found) == Counter(texts)
        assert found != texts
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize(("open_parts", "most"), [(1, 1), (2, 2), (8, 8)])
def test_rows_come_from_the_parts_that_are_open(tmp_path: Path, open_parts: int, most: int) -> None:
    """Four units, each in parts of some 8 rows, on one stream."""
    lines = [b"%d:" % n + b"x" * 2000 for n in range(512)]
    path = write(tmp_path / "a.txt", b"\n".join(lines))
    one = build(source(path, documents="line"), streams=1, open_parts=open_parts)
    opened, units = [], []
    for _ in range(100):
        units.append(one.read(1 << 30).origin.unit)
        opened.append(len(one.state()["sources"]["a"]["open"]))
    assert max(opened) == most
    if open_parts == 1:
        assert len(set(units[:6])) == 1
    else:
        assert len(set(units)) == 4


def test_pieces_go_on_with_the_same_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {n} é\n" for n in range(200)) + "x" * 100
    path = write(tmp_path / "a.jsonl", jsonl([text]))
    monkeypatch.setattr(pieces, "PIECE", 64)
    stream = build(path, streams=1)
    tokens, begins, ends, text_bytes = [], [], [], 0
    while not tokens or tokens[-1] != 0:
        part = stream.read(50)
        tokens += part.tokens.tolist()
        begins.append(part.begins)
        ends.append(part.ends)
        text_bytes += part.text_bytes
    assert texts_of(tokens) == [text]
    assert begins == [True] + [False] * (len(begins) - 1)
    assert ends == [False] * (len(begins) - 1) + [True]
    assert text_bytes == len(text.encode())


def test_reads_say_which_row_they_are_of(tmp_path: Path) -> None:
    texts = [document(number) for number in range(20)]
    path = write(tmp_path / "a.jsonl", jsonl(texts))
    content = path.read_bytes()
    stream = build(path, streams=1)
    for _ in range(60):
        part = stream.read(1 << 30)
        name, file, unit, address, epoch = part.origin[:5]
        assert (name, file, unit) == ("a", "a.jsonl", 0)
        row = json.loads(content[address : content.index(b"\n", address)])
        assert texts_of(part.tokens.tolist()) == [row["text"]]
        assert epoch == stream.sources["a"].epoch
    assert epoch == 2


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
    monkeypatch.setattr(pieces, "PIECE", 64)
    fields: dict[str, Any] = {"tokenizer": tokenizer, "streams": 1}
    whole = take(build(path, **fields), 600)
    end = whole.index(tokenizer.end_of_document)
    assert tokenizer.decode(whole[:end]) == text
    for before in (1, 17, 40, 100):
        one = build(path, **fields)
        take(one, before)
        other = resumed(one.state(), path, **fields)
        assert take(other, 50) == whole[before : before + 50]


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 3000), st.integers(1, 90), st.integers(0, STREAMS - 1), st.integers(1, 20))
def test_the_state_is_exact_at_every_position(
    tmp_path: Path, before: int, limit: int, index: int, open_parts: int
) -> None:
    if not (tmp_path / "b.jsonl").exists():
        write(tmp_path / "a.jsonl", jsonl(document(n) for n in range(20)) + b"broken\n")
        write(tmp_path / "b.jsonl", jsonl([document(n) * 9 for n in range(100, 107)] + [""]))
    paths = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 100)
        one = build(*paths, stream=index, open_parts=open_parts)
        take(one, before, limit)
        other = resumed(one.state(), *paths, stream=index, open_parts=open_parts)
        assert other.state() == one.state()
        assert take(other, 500) == take(one, 500)
        assert other.state() == one.state()


def account_of(stream: DocumentStream, name: str = "a") -> Account:
    return Account(**stream.state()["sources"][name].get("account", {}))


def test_bad_rows_are_skipped_counted_once_and_kept_in_the_state(tmp_path: Path) -> None:
    rows = b"{broken\n" + jsonl(["one", "", "two"]) + b'{"text": "\xff"}\n' + jsonl(["three"])
    path = write(tmp_path / "a.jsonl", rows)
    assert sorted(pass_of(lambda index: build(path, stream=index))) == ["one", "three", "two"]
    account = Account()
    for index in range(STREAMS):
        one = build(path, stream=index)
        take(one, 500)
        one = resumed(one.state(), path, stream=index)
        take(one, 500)
        assert one.sources["a"].epoch > 5
        account.update(account_of(one))
    assert account.skipped == Counter({"malformed JSON": 1, "not UTF-8": 1})
    assert account.skipped_bytes == len(b"{broken\n") + len(b'{"text": "\xff"}\n')
    assert (account.empty_rows, account.unreadable_bytes) == (1, 0)


def test_bad_rows_above_the_limit_stop_with_file_and_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(["one", "two"]) + b"[1]\n" + jsonl(["three"]))
    place = len(jsonl(["one", "two"]))
    said = rf"a\.jsonl, byte {place}: not a JSON object.*max_bad_rows = 0"
    with pytest.raises(DataError, match=said):
        [take(build(path, stream=index, limit=0), 100) for index in range(STREAMS)]


def test_rows_of_the_other_split_are_left_out(tmp_path: Path) -> None:
    texts = [document(number) for number in range(30)]
    path = write(tmp_path / "a.jsonl", jsonl(texts))
    seen: set[tuple[str, int]] = set()

    def even(file: str, unit: int, address: int) -> bool:
        seen.add((file, unit))
        return address % 2 == 0

    found = pass_of(lambda i: build(path, stream=i, keeps=even))
    others = pass_of(lambda i: build(path, stream=i, keeps=lambda *row: not even(*row)))
    starts = [len(jsonl(texts[:number])) for number in range(30)]
    assert sorted(found) == sorted(
        text for text, at in zip(texts, starts, strict=True) if at % 2 == 0
    )
    assert sorted(found + others) == sorted(texts)
    assert seen == {("a.jsonl", 0)}


def test_damage_of_a_file_counts_in_both_splits(tmp_path: Path) -> None:
    """Nobody knows to which of them the rows belong that can't be read."""
    whole = gzip.compress(jsonl([document(number) for number in range(9)]), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole + b"not gzip")
    for even in (True, False):
        lost = 0
        for index in range(STREAMS):
            stream = build(
                path, stream=index, keeps=lambda *row, even=even: (row[2] % 2 == 0) is even
            )
            take(stream, 5000)
            lost += account_of(stream).unreadable_bytes
        assert lost == len(b"not gzip")


def test_a_position_is_small(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(["x" * 1_000_000] * 3))
    stream = build(path, streams=1)
    take(stream, 1_400_000)
    assert len(json.dumps(stream.state())) < 400


def test_files_without_a_usable_row_left_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_stream, "HOPELESS_EPOCHS", 2)
    path = write(tmp_path / "a.jsonl", jsonl(["", ""]))
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.path: no usable row is left"):
        build(path).read(1)


# --- Epochs --------------------------------------------------------------------------------------


def test_a_source_ends_after_max_epochs_and_the_others_take_its_share(tmp_path: Path) -> None:
    few, many = [document(n) for n in range(10)], [document(n) for n in range(100, 400)]
    write(tmp_path / "a.jsonl", jsonl(few))
    write(tmp_path / "b.jsonl", jsonl(many))
    ending = source(tmp_path / "a.jsonl", "a", max_epochs=2, after_max_epochs="end")
    found: Counter[str] = Counter()
    for index in range(STREAMS):
        paths = (ending, tmp_path / "b.jsonl")
        one = build(*paths, stream=index)
        texts = texts_of(take(one, 4000))
        assert one.state()["ended"] == ["a"]
        assert not set(texts[len(texts) // 2 :]) & set(few)
        other = resumed(one.state(), *paths, stream=index)
        assert take(other, 500) == take(one, 500)
        found.update(text for text in texts if text in few)
    assert found == Counter(few * 2)


def test_a_source_that_may_not_end_stops_the_run_and_so_does_the_last(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(document(n) for n in range(10)))
    said = r'"a" has been read data\.sources\.max_epochs = 3 times \(by stream 0\)\. Raise'
    with pytest.raises(DataError, match=said):
        take(build(source(path, "a", max_epochs=3)), 5000)
    with pytest.raises(DataError, match=r"every source of this phase has been read.*is used up"):
        take(build(source(path, "a", max_epochs=3, after_max_epochs="end")), 5000)


# --- Phases, and files that join and leave -------------------------------------------------------


def test_new_weights_hold_from_where_they_begin(tmp_path: Path) -> None:
    """Shares count from there; the document under way is finished."""
    for name, first in (("a", 0), ("b", 1000)):
        write(tmp_path / f"{name}.jsonl", jsonl(document(n) for n in range(first, first + 300)))
    paths = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    one = build(*paths)
    take(one, 2005)
    before = {name: part.tokens for name, part in one.sources.items()}
    assert before["a"] == pytest.approx(before["b"], abs=61)
    one.begin(10, {"b": 1.0})
    take(one, 1000)
    assert one.sources["a"].tokens <= before["a"] + 61
    one.begin(20, {"a": 0.9, "b": 0.1})
    before = {name: part.tokens for name, part in one.sources.items()}
    take(one, 5000)
    assert one.sources["a"].tokens - before["a"] == pytest.approx(4500, abs=122)


def test_a_document_of_a_file_that_leaves_ends_there(tmp_path: Path) -> None:
    for name, letter in (("0", "x"), ("1", "y")):
        write(tmp_path / f"{name}.jsonl", jsonl([letter * 5000] * 40))
    gone = [Change(0, 7, None, str(tmp_path / "0.jsonl"))]
    pattern = tmp_path / "*.jsonl"
    one = build(pattern, changes=gone)
    while one.read(100).origin.file != "0.jsonl":
        pass
    state = one.state()
    one.begin(7, None)
    last = one.read(100)
    assert (last.tokens.tolist(), last.begins, last.ends, last.text_bytes) == ([0], False, True, 0)
    assert set(take(one, 20_000)) == {0, ord("y") + 1}
    again = resumed(state, pattern, changes=gone, step=7)
    again.begin(7, None)
    assert again.read(100).tokens.tolist() == [0]
    assert again.read(100).origin.file == "1.jsonl"


def test_a_state_between_a_departure_and_its_last_token_goes_on(tmp_path: Path) -> None:
    """The file may be gone by then; only the end-of-document token of its text is to be given."""
    for name, letter in (("0", "x"), ("1", "y")):
        write(tmp_path / f"{name}.jsonl", jsonl([letter * 5000] * 40))
    pattern = tmp_path / "*.jsonl"
    gone = [Change(0, 7, None, str(tmp_path / "0.jsonl"))]
    one = build(pattern, changes=gone)
    while one.read(100).origin.file != "0.jsonl":
        pass
    one.begin(7, None)
    again = resumed(one.state(), pattern, changes=gone, step=8)
    assert take(again, 9000) == take(one, 9000)
    assert again.state() == one.state()


def test_rows_of_files_that_join_come_in_the_same_epoch(tmp_path: Path) -> None:
    old, new = [document(n) for n in range(60)], [document(n) for n in range(100, 130)]
    write(tmp_path / "0.jsonl", jsonl(old))
    write(tmp_path / "1.jsonl", jsonl(new))
    joins = [Change(0, 5, str(tmp_path / "1.jsonl"), None)]
    counts: Counter[tuple[int, str]] = Counter()
    for index in range(STREAMS):
        one = build(tmp_path / "*.jsonl", stream=index, changes=joins)
        for turn in range(100):
            if turn == 6:
                one.begin(5, None)
            part = one.read(1 << 30)
            (text,) = texts_of(part.tokens.tolist())
            assert turn >= 6 or text in old
            counts[part.origin.epoch, text] += 1
    first = {text: count for (epoch, text), count in counts.items() if epoch == 0}
    assert first == dict.fromkeys(old + new, 1)
