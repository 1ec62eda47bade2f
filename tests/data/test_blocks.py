import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.config import SourceConfig
from megapipe.data import blocks
from megapipe.data.blocks import Address, Block, BlockReader, Cursor, permutation
from megapipe.data.formats import Raw
from megapipe.data.sources import Source, open_source
from megapipe.errors import DataError
from tests.data.samples import write


class ListFile:
    """Rows in memory that count how often they are read."""

    kind = "text"

    def __init__(self, name: str, rows: list[bytes], seekable: bool = True) -> None:
        self.name = name
        self.seekable = seekable
        self._rows = rows
        self.read = 0

    def rows(self, row: int, offset: int) -> "list[Raw]":
        return self._generate(row)  # type: ignore[return-value]

    def _generate(self, row: int):  # type: ignore[no-untyped-def]
        for number, raw in enumerate(self._rows[row:], start=row):
            self.read += 1
            yield raw, number + 1


def source_of(sizes: list[int], seekable: bool = True, row_bytes: int = 1) -> Source:
    files = tuple(
        ListFile(f"{index}", [b"x" * row_bytes] * size, seekable)
        for index, size in enumerate(sizes)
    )
    return Source("data.sources[0]", SourceConfig(path="x"), files, "", 0)  # type: ignore[arg-type]


def reader(
    source: Source, block_rows: int, streams: int, hosted: set[int] | None = None
) -> BlockReader:
    return BlockReader(
        source,
        block_rows=block_rows,
        streams=streams,
        hosted=frozenset(range(streams) if hosted is None else hosted),
        seed=1,
    )


def read_blocks(source: Source, block_rows: int, streams: int, numbers: int) -> list[Block | None]:
    """Blocks 0, 1, ... in order."""
    one = reader(source, block_rows, streams)
    return [one.read(number, None) for number in range(numbers)]


def places(block: Block | None) -> list[tuple[int, int]] | None:
    return None if block is None else [(row.file, row.number) for row in block.rows]


@given(st.integers(0, 500), st.integers())
def test_permutation_is_one(count: int, key: int) -> None:
    assert sorted(permutation(count, key)) == list(range(count))


def test_permutation_never_changes() -> None:
    assert permutation(8, "rows", 1, "data.sources[0]", 3) == [5, 6, 7, 1, 2, 4, 0, 3]
    draws = Counter(tuple(permutation(3, key)) for key in range(6000))
    assert len(draws) == 6
    assert all(850 < count < 1150 for count in draws.values())


sizes = st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(sum)


@settings(deadline=None, max_examples=150)
@given(sizes, st.integers(1, 7), st.integers(1, 8))
def test_every_epoch_deals_every_row_once_and_numbers_rise(
    sizes: list[int], block_rows: int, streams: int
) -> None:
    source = source_of(sizes)
    found = read_blocks(source, block_rows, streams, 12 * (sum(sizes) + streams))
    by_epoch: dict[int, list[tuple[int, int]]] = {}
    for block in filter(None, found):
        assert 1 <= len(block.rows) <= block_rows
        by_epoch.setdefault(block.address.epoch, []).extend(places(block) or [])
    whole = sorted((file, row) for file, size in enumerate(sizes) for row in range(size))
    assert list(by_epoch) == list(range(len(by_epoch)))
    assert len(by_epoch) >= 4
    for epoch in list(by_epoch)[:-1]:
        assert sorted(by_epoch[epoch]) == whole


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 8))
def test_a_stream_meets_every_block_in_as_many_epochs_as_there_are_streams(
    rows: int, block_rows: int, streams: int
) -> None:
    source = source_of([rows])
    count = -(-rows // block_rows)
    found = read_blocks(source, block_rows, streams, (count + streams) * (streams + 1))
    for stream in range(streams):
        met = {place for block in found[stream::streams] for place in places(block) or []}
        assert len(met) == rows


@settings(deadline=None, max_examples=100)
@given(sizes, st.integers(1, 5), st.integers(1, 6), st.booleans(), st.randoms())
def test_blocks_do_not_depend_on_who_reads_or_in_what_order(
    sizes: list[int], block_rows: int, streams: int, seekable: bool, chance: random.Random
) -> None:
    source = source_of(sizes, seekable)
    expected = [places(block) for block in read_blocks(source, block_rows, streams, 60)]
    hosted = set(chance.sample(range(streams), chance.randint(1, streams)))
    one = reader(source, block_rows, streams, hosted)
    positions: dict[int, tuple[int, Address | None]] = {s: (s, None) for s in hosted}
    for _ in range(40):
        stream = chance.choice(sorted(hosted))
        number, near = positions[stream]
        if number >= 60:
            continue
        if chance.random() < 0.1:  # another reader takes over from the state
            one = reader(source, block_rows, streams, hosted)
        block = one.read(number, near)
        assert places(block) == expected[number]
        positions[stream] = (number + streams, block.address if block else near)


@pytest.mark.parametrize("seekable", [True, False])
def test_memory_is_bounded_when_a_stream_lags(
    monkeypatch: pytest.MonkeyPatch, seekable: bool
) -> None:
    monkeypatch.setattr(blocks, "KEPT_BYTES", 50)
    source = source_of([4000], seekable)
    one = reader(source, 10, 4)
    near: Address | None = None
    for number in range(0, 400, 4):  # stream 0 runs ahead through the whole epoch
        block = one.read(number, near)
        assert block is not None
        near = block.address
        assert one._kept_bytes <= 50 + 10
        assert len(one._cursors) <= blocks.MAX_CURSORS
    expected = read_blocks(source_of([4000]), 10, 4, 400)
    near = None
    for number in range(1, 400, 4):
        block = one.read(number, near)
        assert block is not None
        assert places(block) == places(expected[number])
        near = block.address
    (file,) = source.files
    assert isinstance(file, ListFile)
    assert file.read < 3 * 4000


def test_streams_that_keep_pace_share_one_scan() -> None:
    source = source_of([4000], seekable=False)
    one = reader(source, 10, 4)
    addresses: list[Address | None] = [None] * 4
    for number in range(400):
        stream = [2, 0, 3, 1][number % 4]
        number = number // 4 * 4 + stream
        block = one.read(number, addresses[stream])
        assert block is not None
        addresses[stream] = block.address
    (file,) = source.files
    assert isinstance(file, ListFile)
    assert file.read <= 4000 + 1


def test_a_block_is_closed_by_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    found = read_blocks(source_of([20], row_bytes=30), 1000, 1, 5)
    assert [len(block.rows) for block in found if block] == [4] * 5


def test_the_order_of_files_changes_with_epoch_and_seed() -> None:
    source = source_of([1] * 20)
    orders = []
    for seed in (1, 2):
        cursor = Cursor(source, Address(0, 0, 0, 0, 0, 0), block_rows=1, streams=1, seed=seed)
        orders += [tuple(cursor.read(keep=True).rows[0].file for _ in range(20)) for _ in range(2)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_an_address_opens_a_block_in_real_files(tmp_path: Path, suffix: str) -> None:
    for part in range(3):
        lines = b"".join(b"%d %d\n" % (part, n) for n in range(50))
        write(tmp_path / f"{part}.txt{suffix}", lines)
    config = SourceConfig(path=str(tmp_path / "*.txt*"), documents="line")
    source = open_source(config, "data.sources[0]", 3)
    for block in read_blocks(source, 7, 3, 60):
        if block is not None:
            again = reader(source, 7, 3).read(block.address.number, block.address)
            assert again == block


def test_files_that_lost_their_rows_stop_the_run() -> None:
    source = replace(source_of([0]))
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.path: no rows are left"):
        reader(source, 1, 1).read(0, None)
