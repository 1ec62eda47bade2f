"""The first rows of a run are a fair sample of a source, though its files are sorted."""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from numpy.typing import NDArray

from megapipe.config import DataConfig, SourceConfig
from tests.data.samples import jsonl, open_feed

GROUPS, ROWS, SAMPLE = 50, 12_800, 1_024
STREAMS = 16
SEEDS = 6
"""All 200 seeds were run once by hand: see `python -m tests.data.order.test_shuffle`."""
FILLING = "x" * 120


def lines(kind: str) -> list[bytes]:
    """Rows in the order of their groups."""
    texts = [f"{row * GROUPS // ROWS:02d}{FILLING}" for row in range(ROWS)]
    return [jsonl([text]) if kind in ("jsonl", "zst") else f"{text}\n".encode() for text in texts]


def write_sorted(folder: Path, kind: str) -> SourceConfig:
    rows = lines(kind)
    if kind == "parquet":
        table = pa.table({"text": [row.decode().rstrip() for row in rows]})
        pq.write_table(table, folder / "a.parquet", row_group_size=100)
    elif kind == "zst":  # incompressible, so that there are many frames above the least size
        noise = np.random.default_rng(1)
        frames = []
        for start in range(0, ROWS, 200):
            filled = [
                json.loads(row)["text"][:2] + noise.bytes(400).hex()
                for row in rows[start : start + 200]
            ]
            frames.append(zstandard.compress(jsonl(filled), 1))
        (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    else:
        suffix = "jsonl" if kind == "jsonl" else "md"
        (folder / f"a.{suffix}").write_bytes(b"".join(rows))
    return SourceConfig(name="sorted", path=f"{folder}/a.*", documents="line")


def first_groups(config: DataConfig, replicas: int, seed: int) -> list[int]:
    """The groups of the first rows: a document's first two characters."""
    feeds = [
        open_feed(config, rank, replicas, seed=seed, global_batch_size=STREAMS, sequence_length=256)
        for rank in range(replicas)
    ]
    found: list[int] = []
    made: list[Iterator[object]] = [
        iter(feed._batches()) for feed in feeds
    ]  # without their threads
    while len(found) < SAMPLE:
        for batches in made:
            batch = next(batches)
            for tokens, stretches in zip(batch.tokens, batch.stretches, strict=True):  # type: ignore[attr-defined]
                for stretch in stretches:
                    if stretch.begins and stretch.length > 1:
                        digits = tokens[stretch.start : stretch.start + 2] - 1
                        found.append(int(bytes(digits.tolist())))
    for feed in feeds:
        feed.close()
    return found[:SAMPLE]


def p_value(groups: list[int]) -> float:
    """Of Pearson's test that each group is as frequent as in the source, of which the rows were
    drawn without being put back (so that frequencies vary a little less)."""
    expected = SAMPLE / GROUPS
    counts = Counter(groups)
    deviation = sum((counts[group] - expected) ** 2 for group in range(GROUPS)) / expected
    return chi_squared_tail(deviation * (ROWS - 1) / (ROWS - SAMPLE), GROUPS - 1)


def chi_squared_tail(value: float, freedom: int) -> float:
    """By a sample of the distribution itself, so that the tests need no other library."""
    sample = _chi_squared(freedom)
    return 1 - bisect_right(sample, value) / len(sample)


def _chi_squared(freedom: int, cache: dict[int, list[float]] = {}) -> list[float]:  # noqa: B006
    if freedom not in cache:
        cache[freedom] = sorted(np.random.default_rng(7).chisquare(freedom, 100_000).tolist())
    return cache[freedom]


def distance_from_uniform(values: list[float]) -> float:
    """Kolmogorov and Smirnov's statistic times the root of the number of values: above 1.63 in one
    case of a hundred, above 1.95 in one of a thousand."""
    ordered: NDArray[np.float64] = np.sort(np.array(values))
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(np.max(steps[1:] - ordered), np.max(ordered - steps[:-1]))
    return float(distance * np.sqrt(len(ordered)))


def distance(folder: Path, kind: str, replicas: int, seeds: int) -> float:
    config = DataConfig(tokenizer="bytes", streams=STREAMS, sources=(write_sorted(folder, kind),))
    return distance_from_uniform(
        [p_value(first_groups(config, replicas, seed)) for seed in range(seeds)]
    )


@pytest.mark.parametrize(
    ("kind", "replicas"), [("text", 1), ("jsonl", 1), ("parquet", 8), ("zst", 1)]
)
def test_rows_are_drawn_from_all_of_a_sorted_source(
    tmp_path: Path, kind: str, replicas: int
) -> None:
    assert distance(tmp_path, kind, replicas, SEEDS) < 1.95


def test_an_order_in_blocks_of_neighbours_fails() -> None:
    """Blocks of 64 rows, one for each stream in turn: few groups in the first rows."""
    values = []
    for seed in range(SEEDS):
        blocks = np.random.default_rng(seed).permutation(ROWS // 64)[: SAMPLE // 64]
        values.append(p_value([int(b) * 64 * GROUPS // ROWS for b in blocks for _ in range(64)]))
    assert distance_from_uniform(values) > 1.95


def test_turns_without_chance_fail() -> None:
    """As many rows of each group as of any other are no fair sample either."""
    values = [p_value([row % GROUPS for row in range(SAMPLE)]) for _ in range(SEEDS)]
    assert distance_from_uniform(values) > 1.95


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    for kind in ("text", "jsonl", "parquet", "zst"):
        for replicas in (1, 8):
            with TemporaryDirectory() as folder:
                print(kind, replicas, round(distance(Path(folder), kind, replicas, 200), 3))
