"""What is read from healthy files, and in which order, stays the same bit by bit.

A change here is a change of every run that goes on from a checkpoint. The hashes of rows were
computed with the readers of the first version (but for "text-long-file", which was cut elsewhere).
Those of batches pin the order: where a change of it is meant (ORDER_VERSION is another then),
`python -m tests.data.test_golden_order` prints the new ones, once tests/data/order/test_rule.py
passes, which computes the order in another way. Archives have none: the order of their rows depends
on their size on the disk, which is not the same with every version of zlib and zstd.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapipe.config import SourceConfig
from megapipe.data.sources import open_source
from tests.data.samples import data_config, digest, document, jsonl, open_feed, source, write

STREAMS = 4


def lines(start: int, count: int) -> list[str]:
    return [f"{document(n)} é漢🎉"[: 8 + n % 40] for n in range(start, start + count)]


def write_texts(directory: Path, suffix: str = "") -> str:
    for part in range(3):
        text = "\n".join(
            line + "\n" * (n % 5 == 0) + "\r" * (n % 7 == 0)
            for n, line in enumerate(lines(part * 1000, 300 + 50 * part))
        )
        write(directory / f"{part}.txt{suffix}", text.encode())
    return str(directory / f"*.txt{suffix}")


def write_long_text(directory: Path) -> str:
    """One paragraph of 9 MB, in lines."""
    write(directory / "long.txt", ("\n".join(lines(0, 40_000)) * 8).encode())
    return str(directory / "long.txt")


def write_jsonl(directory: Path, suffix: str = "") -> str:
    for part in range(3):
        rows = jsonl(lines(part * 1000, 200 + 40 * part))
        write(directory / f"{part}.jsonl{suffix}", rows + b"\n" + jsonl(["last"]))
    return str(directory / f"*.jsonl{suffix}")


def table(part: int, rows: int) -> pa.Table:
    return pa.table({"id": range(rows), "text": lines(part * 1000, rows), "label": [part] * rows})


def write_parquet(directory: Path) -> str:
    """Row groups larger and smaller than the 256 rows that are read at once."""
    directory.mkdir(parents=True)
    for part, group in enumerate((700, 100, 300)):
        pq.write_table(table(part, 900), directory / f"{part}.parquet", row_group_size=group)
    return str(directory / "*.parquet")


def write_arrow(directory: Path, make: Callable[..., Any]) -> str:
    directory.mkdir(parents=True)
    for part, chunk in enumerate((600, 100)):
        whole = table(part, 700)
        path = str(directory / f"{part}.arrow")
        with pa.OSFile(path, "wb") as file, make(file, whole.schema) as writer:
            writer.write_table(whole, max_chunksize=chunk)
    return str(directory / "*.arrow")


WRITERS: dict[str, Callable[[Path], SourceConfig]] = {
    **{
        f"text-{documents}{suffix}": lambda directory, d=documents, s=suffix: source(  # type: ignore[misc]
            write_texts(directory, s), documents=d
        )
        for documents in ("file", "line", "blank-line")
        for suffix in ("", ".gz", ".zst")
    },
    "text-long-file": lambda d: source(write_long_text(d), documents="file"),
    "text-long-paragraph": lambda d: source(write_long_text(d), documents="blank-line"),
    "jsonl": lambda d: source(write_jsonl(d)),
    "jsonl.gz": lambda d: source(write_jsonl(d, ".gz")),
    "jsonl.zst": lambda d: source(write_jsonl(d, ".zst")),
    "parquet": lambda d: source(write_parquet(d)),
    "arrow-stream": lambda d: source(write_arrow(d, pa.ipc.new_stream)),
    "arrow-file": lambda d: source(write_arrow(d, pa.ipc.new_file)),
}

ROWS = {
    "text-file": "6bacad1cb8e06de8",
    "text-file.gz": "6bacad1cb8e06de8",
    "text-file.zst": "6bacad1cb8e06de8",
    "text-line": "e6f6f33c5c07d5c8",
    "text-line.gz": "e6f6f33c5c07d5c8",
    "text-line.zst": "e6f6f33c5c07d5c8",
    "text-blank-line": "4752dd9930edf4d4",
    "text-blank-line.gz": "4752dd9930edf4d4",
    "text-blank-line.zst": "4752dd9930edf4d4",
    "text-long-file": "08a33f617e5c61fe",
    "text-long-paragraph": "84e10df47fa7808f",
    "jsonl": "e854e80652181e0d",
    "jsonl.gz": "e854e80652181e0d",
    "jsonl.zst": "e854e80652181e0d",
    "parquet": "5995e00af9153f4b",
    "arrow-stream": "6b5ef7858376d18a",
    "arrow-file": "6b5ef7858376d18a",
}
BATCHES = {
    "text-file": "c7f27c9453364f16",
    "text-line": "a2ec9ddb148252be",
    "text-blank-line": "2c6917ea52cf1a61",
    "jsonl": "1438d361fcbf848f",
    "parquet": "60c5b4e3b2588aac",
    "arrow-stream": "aca2c897f8660b59",
    "arrow-file": "aca2c897f8660b59",
    "blend 0.0": "ac71bab2f4c487db",
    "blend 0.2": "8bc095f87dfffb3d",
}


def rows_digest(config: SourceConfig) -> str:
    """Of every row's file, number and text, unit by unit."""
    found = open_source(config, "data.sources[0]", STREAMS)
    digest_ = hashlib.sha256()
    for index, file in enumerate(found.cohorts[0].files):
        assert file.rows is not None
        rows = [row for unit in file.units for row in file.rows.rows(unit)]
        assert rows == list(file.rows.rows())
        assert len({row.address for row in rows}) == len(rows)
        for number, row in enumerate(rows):
            digest_.update(f"{index} {number} {found.text(file.rows, row.value)!r}\n".encode())
    return digest_.hexdigest()[:16]


def batches_digest(*sources: SourceConfig, steps: int, size: int, **fields: Any) -> str:
    config = data_config(*sources, streams=STREAMS, open_parts=64, **fields)
    feeds = [open_feed(config, rank, size) for rank in range(size)]
    found = [digest([next(feed) for feed in feeds]) for _ in range(steps)]
    for feed in feeds:
        feed.close()
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def blend(folder: Path) -> list[SourceConfig]:
    return [
        WRITERS[name](folder / name).model_copy(update={"weight": weight, "name": name})
        for name, weight in [("text-line", 3.0), ("parquet", 1.0), ("jsonl", 2.0)]
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_healthy_files(tmp_path: Path, name: str) -> None:
    assert rows_digest(WRITERS[name](tmp_path / "data")) == ROWS[name]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", [name for name in BATCHES if name in WRITERS])
def test_batches_of_healthy_files(tmp_path: Path, name: str, size: int) -> None:
    config = WRITERS[name](tmp_path / "data")
    assert batches_digest(config, steps=150, size=size) == BATCHES[name]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_batches_of_a_blend(tmp_path: Path, fraction: float, size: int) -> None:
    found = batches_digest(*blend(tmp_path), steps=200, size=size, validation_fraction=fraction)
    assert found == BATCHES[f"blend {fraction}"]


def main() -> None:
    """Print the hashes of batches."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for kind in BATCHES:
            if kind.startswith("blend"):
                fraction = float(kind.split()[1])
                sources, steps = blend(folder / kind), 200
            else:
                fraction, sources, steps = 0.0, [WRITERS[kind](folder / kind)], 150
            found = batches_digest(*sources, steps=steps, size=1, validation_fraction=fraction)
            print(f'    "{kind}": "{found}",')


if __name__ == "__main__":
    main()
