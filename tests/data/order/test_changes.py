"""A run whose mix, files and excluded rows change on the way, in several layouts."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapipe.config import ChangeConfig, DataConfig, ExcludeConfig, PhaseConfig, SourceConfig
from megapipe.data import BatchFeed, merge_states
from megapipe.data.feed import State
from tests.data.samples import ByteTokenizer, document, open_feed

STREAMS = 8
LENGTH = 64
Row = tuple[str, str, int]
"""Source, file and address."""


@dataclass
class Run:
    """Batches of one replica after the other; a new start may have another config and layout."""

    record: Path
    step: int = 0
    hashes: list[int] = field(default_factory=list)
    rows: dict[tuple[str, int], list[Row]] = field(default_factory=lambda: defaultdict(list))
    """Documents begun, by source and stream, in order."""
    begun_at: dict[Row, list[int]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[Counter[str]] = field(default_factory=list)
    """By source, for each step."""
    state: State | None = None

    def go(self, config: DataConfig, until: int, replicas: int) -> None:
        feeds = [
            open_feed(
                config,
                rank,
                replicas,
                global_batch_size=STREAMS,
                sequence_length=LENGTH,
                record=self.record,
            )
            for rank in range(replicas)
        ]
        for feed in feeds:
            if self.state is not None:
                feed.load_state_dict(json.loads(json.dumps(self.state)))
        while self.step < until:
            self._take(feeds)
        self.state = merge_states([feed.state_dict() for feed in feeds])
        for feed in feeds:
            feed.close()

    def _take(self, feeds: Sequence[BatchFeed]) -> None:
        batches = [next(feed) for feed in feeds]
        self.hashes.append(sum(batch.hash for batch in batches) % 2**64)
        self.tokens.append(Counter())
        for batch in batches:
            for sample, stretches in zip(batch.samples, batch.stretches, strict=True):
                for stretch in stretches:
                    source, file, _, address = stretch.origin[:4]
                    self.tokens[-1][source] += stretch.length
                    if stretch.begins:
                        self.rows[source, sample % STREAMS].append((source, file, address))
                        self.begun_at[source, file, address].append(self.step)
        self.step += 1


def write_rows(path: Path, first: int, count: int) -> None:
    """Documents that begin with their numbers, which are their ids too."""
    numbers = range(first, first + count)
    texts = [document(number) for number in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "id": list(numbers)}), path, row_group_size=100)


def source(folder: Path, name: str, weight: float) -> SourceConfig:
    return SourceConfig(name=name, path=f"{folder}/{name}/*.parquet", weight=weight, id_field="id")


def config(*sources: SourceConfig, **fields: Any) -> DataConfig:
    return DataConfig(tokenizer="bytes", streams=STREAMS, sources=sources, **fields)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, name in enumerate(("books", "code", "web")):
        for file in range(3):
            write_rows(folder / name / f"{file}.parquet", number * 100_000 + file * 1000, 400)
    return folder


def windows(run: Run, begin: int, length: int) -> Iterator[Counter[str]]:
    for first in range(begin, len(run.tokens) - length + 1):
        yield sum(run.tokens[first : first + length], Counter())


def test_shares_follow_new_weights_at_once(corpus: Path, tmp_path: Path) -> None:
    """From 10 % to 50 % behind step 100: nothing is repaid."""
    weights = {"web": 0.5, "code": 0.3, "books": 0.2}
    changed = config(
        source(corpus, "web", 0.1),
        source(corpus, "code", 0.6),
        source(corpus, "books", 0.3),
        phases=(PhaseConfig(after_step=100, weights=weights),),
    )
    run = Run(tmp_path)
    run.go(changed, 160, replicas=1)
    longest = max(len(document(number)) for number in range(1000)) + 1
    for window in windows(run, 100, 20):
        total = sum(window.values())
        for name, weight in weights.items():
            allowed = 0.01 * total + STREAMS * longest
            assert abs(window[name] - weight * total) <= allowed, (name, window)
    mean = sum(run.tokens[100:160], Counter())
    assert mean["web"] / sum(mean.values()) == pytest.approx(0.5, abs=0.01)


def test_a_phase_is_the_same_in_every_layout_and_over_restarts(
    corpus: Path, tmp_path: Path
) -> None:
    phases = (
        PhaseConfig(after_step=10, weights={"web": 1.0, "code": 2.0}),
        PhaseConfig(after_tokens=30 * STREAMS * LENGTH, weights={"books": 1.0}),
    )
    changed = config(
        *(source(corpus, name, 1.0) for name in ("web", "code", "books")), phases=phases
    )
    expected = Run(tmp_path)
    expected.go(changed, 40, replicas=1)
    assert set(expected.tokens[12]) == {"web", "code"}
    assert set(expected.tokens[31]) == {"books"}
    for replicas in ((2, 8, 1), (4, 1, 2), (8, 4, 8), (1, 2, 4)):
        run = Run(tmp_path)
        for until, size in zip((10, 23, 40), replicas, strict=True):
            run.go(changed, until, size)
        assert run.hashes == expected.hashes, replicas


def excluded_list(path: Path, ids: Sequence[int]) -> ExcludeConfig:
    pq.write_table(pa.table({"id": list(ids)}), path)
    return ExcludeConfig(path=str(path))


def test_rows_files_and_sources_come_and_go_as_declared(corpus: Path, tmp_path: Path) -> None:
    """Behind step 50 of 100: 1,000 rows are excluded, a source is added in front, one is dropped,
    files are added and one is removed; in four layouts, over two kills each."""
    folder = tmp_path / "corpus"
    for name in ("books", "code", "web"):
        for file in (corpus / name).iterdir():
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / file.name).write_bytes(file.read_bytes())
    first = config(
        *(source(folder, name, 1.0) for name in ("web", "code", "books")), validation_fraction=0.05
    )
    plain = Run(tmp_path / "plain")
    plain.go(first, 100, replicas=1)
    validated = validation_hashes(first)
    layouts = ((1, 1, 1), (2, 4, 8), (8, 2, 1), (4, 8, 2))
    runs = [Run(tmp_path / f"record{number}") for number in range(len(layouts))]
    for run, sizes in zip(runs, layouts, strict=True):
        run.go(first, 50, sizes[0])
        assert run.hashes == plain.hashes[:50]

    write_rows(folder / "aaa" / "0.parquet", 900_000, 400)
    write_rows(folder / "code" / "new.parquet", 950_000, 300)
    ids = [*range(200_000, 200_400), *range(201_000, 201_400), *range(100_000, 100_200)]
    second = config(
        source(folder, "aaa", 0.0),
        *first.sources,
        validation_fraction=0.05,
        phases=(PhaseConfig(after_step=50, weights={"aaa": 1.0, "web": 1.0, "code": 1.0}),),
        changes=(
            ChangeConfig(after_step=50, source="code", add=f"{folder}/code/new.parquet"),
            ChangeConfig(after_step=50, source="code", remove=f"{folder}/code/2.parquet"),
        ),
        exclude=(excluded_list(tmp_path / "deleted.parquet", ids),),
    )
    assert len(ids) == 1000
    excluded = rows_of(folder, ids)
    hashes = set()
    for run, sizes in zip(runs, layouts, strict=True):
        run.go(second, 73, sizes[1])
        run.go(second, 100, sizes[2])
        hashes.add(tuple(run.hashes))
        begun = {row for row, steps in run.begun_at.items() if max(steps) >= 50}
        assert not begun & excluded
        assert any(row[0] == "aaa" for row in begun)
        assert any(row[1] == "new.parquet" for row in begun)
        assert not any(row[0] == "books" or row[:2] == ("code", "2.parquet") for row in begun)
        check_order(plain, run, excluded)
    assert len(hashes) == 1
    assert validation_hashes(second) == validated
    assert_never_trained(second, runs[0])


def rows_of(folder: Path, ids: Sequence[int]) -> set[Row]:
    found = set()
    for path in folder.glob("*/*.parquet"):
        for address, id_ in enumerate(pq.read_table(path)["id"].to_pylist()):
            if id_ in set(ids):
                found.add((path.parent.name, path.name, address))
    return found


def check_order(plain: Run, run: Run, excluded: set[Row]) -> None:
    """Web's rows keep their order in each stream, without the excluded ones."""
    for stream in range(STREAMS):
        before, after = plain.rows["web", stream], run.rows["web", stream]
        kept = [row for row in before if row not in excluded or row in after]
        common = min(len(kept), len(after))
        assert common > 20
        assert after[:common] == kept[:common]


def validation_hashes(given: DataConfig) -> list[int]:
    feed = open_feed(given, validation=True, global_batch_size=8, sequence_length=LENGTH)
    found = [next(feed).hash for _ in range(5)]
    feed.close()
    return found


def assert_never_trained(given: DataConfig, run: Run) -> None:
    feed = open_feed(given, validation=True, global_batch_size=8, sequence_length=LENGTH)
    rows = {
        stretch.origin[:2] + (stretch.origin.address,)
        for _ in range(10)
        for stretches in next(feed).stretches
        for stretch in stretches
    }
    feed.close()
    assert len(rows) > 20
    assert not rows & run.begun_at.keys()


def test_an_excluded_document_under_way_ends(tmp_path: Path) -> None:
    """With an end-of-document token, and the next one follows."""
    texts = ["a" * 5000, *("b" * 50 for _ in range(100))]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts))
    )
    first = DataConfig(
        tokenizer="bytes",
        streams=1,
        sources=(SourceConfig(name="a", path=str(path), id_field="id"),),
    )
    letter = ByteTokenizer().encode("a")[0]
    feed = open_feed(first, global_batch_size=1, sequence_length=LENGTH)
    step = 0
    while (tokens := next(feed).tokens[0])[-1] != letter:
        step += 1
    assert step < 100
    state = json.loads(json.dumps(merge_states([feed.state_dict()])))
    feed.close()
    deleted = excluded_list(tmp_path / "deleted.parquet", [0])
    second = first.model_copy(update={"exclude": (deleted,)})
    feed = open_feed(second, global_batch_size=1, sequence_length=LENGTH)
    feed.load_state_dict(state)
    tokens = next(feed).tokens[0]
    assert tokens[0] == letter  # the overlap: it was a target before
    assert tokens[1] == ByteTokenizer.end_of_document
    for _ in range(150):
        assert letter not in tokens[1:]
        tokens = next(feed).tokens[0]
    feed.close()
    assert feed.account.excluded_rows > 0
    assert np.all(tokens < 257)
