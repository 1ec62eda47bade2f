"""Tables are read from the very file, from any row on, and what is odd is told by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapipe.config import SourceConfig
from megapipe.data.formats import DAMAGED, NoRows, RowFile, Unreadable
from megapipe.data.sources import open_source
from megapipe.errors import DataError

NAMES = ["a.parquet", "a.arrow", "a.stream.arrow"]
TEXTS = [f"row {n}" for n in range(1000)]


def raws(file: RowFile, row: int = 0) -> list[object]:
    return [raw for raw, _ in file.rows(row, 0)]


def write_table(path: Path, table: pa.Table, rows: int = 100) -> Path:
    """With row groups or record batches of `rows`."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
        return path
    make = pa.ipc.new_stream if ".stream" in path.name else pa.ipc.new_file
    with path.open("wb") as file, make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def opened(path: Path, field: str = "text") -> RowFile:
    source = open_source(SourceConfig(path=str(path), text_field=field), "data.sources[0]", 1)
    return source.files[0]


def texts(path: Path) -> list[str | None]:
    source = open_source(SourceConfig(path=str(path)), "data.sources[0]", 1)
    return [source.text(0, raw) for raw in raws(source.files[0])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [100, 300, 1000])
def test_tables_are_read_from_any_row_on(tmp_path: Path, name: str, group: int) -> None:
    table = pa.table({"id": range(1000), "text": TEXTS, "text.more": ["no"] * 1000})
    file = opened(write_table(tmp_path / name, table, group))
    expected = [text.encode() for text in TEXTS]
    assert raws(file) == expected
    for row in (1, 99, 100, 101, 255, 256, 350, 900, 999):
        assert raws(file, row) == expected[row:]
    assert raws(file, 1000) == []


COLUMNS: dict[str, Any] = {
    "string": pa.array(TEXTS),
    "large string": pa.array(TEXTS, pa.large_string()),
    "string view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array([text.encode() for text in TEXTS], pa.binary()),
    "large binary": pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_that_hold_text(tmp_path: Path, name: str, kind: str) -> None:
    path = write_table(tmp_path / name, pa.table({"text": COLUMNS[kind]}), 300)
    assert texts(path) == TEXTS


@pytest.mark.parametrize("name", NAMES)
def test_a_null_is_no_text_and_an_empty_table_is_one_row(tmp_path: Path, name: str) -> None:
    column = pa.array(["one", None, "", "two"])
    file = opened(write_table(tmp_path / name, pa.table({"text": column})))
    assert raws(file) == [b"one", None, b"", b"two"]
    file = opened(write_table(tmp_path / name, pa.table({"text": pa.nulls(3)})))
    assert raws(file) == [None] * 3
    file = opened(write_table(tmp_path / name, pa.table({"text": pa.array([], pa.string())})))
    assert raws(file) == [NoRows()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([1, 2]), "the column 'text' is int64, not text"),
        (pa.array([["a"], ["b"]]), r"the column 'text' is list<.*>, not text"),
        (pa.array([{"a": "b"}] * 2), r"the column 'text' is struct<.*>, not text"),
        (
            pa.array([1, 1]).dictionary_encode(),
            r"the column 'text' is (dictionary<.*>|int64), not text",
        ),
    ],
)
def test_a_column_of_another_type_is_refused_with_its_file(
    tmp_path: Path, name: str, column: Any, said: str
) -> None:
    path = write_table(tmp_path / name, pa.table({"text": column}))
    with pytest.raises(DataError, match=rf"{name}: {said}; set text_field"):
        opened(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_column_that_is_missing_or_there_twice_is_named(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, pa.table({"text": TEXTS, "id": TEXTS}))
    with pytest.raises(DataError, match=rf"{name}: there is no column 'body'.*are: text, id"):
        opened(path, field="body")
    twice = pa.Table.from_arrays([pa.array(TEXTS)] * 2, names=["text", "text"])
    with pytest.raises(DataError, match=rf"{name}: 2 columns are called 'text'"):
        opened(write_table(path, twice))


def test_a_damaged_table_says_what_is_lost(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", pa.table({"text": TEXTS}), 100)
    whole = path.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        (row,) = raws(opened(path))
        assert isinstance(row, Unreadable)
        assert row.reason == DAMAGED
        assert f"none of its {len(content):,} bytes can be read" in row.detail
        assert row.file_bytes == len(content)


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_front_of_damage_are_kept(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, pa.table({"text": [text * 40 for text in TEXTS]}), 250)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:] = (
        content[middle : 2 * middle] if name == "a.stream.arrow" else content[middle:]
    )
    if name == "a.parquet":
        start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
        content[start : start + 400] = bytes(400)
    elif name == "a.stream.arrow":
        del content[middle:]
    else:  # the header of the third record batch, by the length that each begins with
        places = list(find_all(bytes(content), b"\xff\xff\xff\xff"))
        content[places[3] + 4 : places[3] + 400] = bytes(396)
    path.write_bytes(content)
    *before, last = raws(opened(path))
    assert before == [(text * 40).encode() for text in TEXTS[:500]]
    assert isinstance(last, Unreadable)
    said = "rows from 501 on" if name.endswith(".arrow") else "500 of its 1,000 rows"
    assert said in last.detail
    assert raws(opened(path), 300) == [*before, last][300:]


def find_all(content: bytes, mark: bytes) -> Iterator[int]:
    place = content.find(mark)
    while place >= 0:
        yield place
        place = content.find(mark, place + 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_that_changed_since_the_start_stops_the_run(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, pa.table({"text": TEXTS}))
    file = opened(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name}: has .* bytes now and had"):
        raws(file)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: can't be read.*put it back"):
        raws(file)


PATTERNS = ["part[0]", "what?", "star*", "x::y", "50% off, [a] b", "hf:part", "new\nline"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("stem", PATTERNS)
def test_names_of_tables_are_no_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str, suffix: str
) -> None:
    folder = tmp_path / "[proj] a::b"
    folder.mkdir()
    write_table(folder / f"{stem}.{suffix}", pa.table({"text": ["right"] * 3}))
    for other in ("part0", "whatX", "star1", "x", "y"):
        write_table(folder / f"{other}.{suffix}", pa.table({"text": ["wrong"] * 3}))
    monkeypatch.chdir(folder)
    assert texts(Path(f"{stem}.{suffix}")) == ["right"] * 3


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.parquet"
    write_table(tmp_path / "a.parquet", pa.table({"text": ["one"]})).rename(path)
    source = open_source(SourceConfig(path=str(tmp_path / "caf*")), "data.sources[0]", 1)
    assert raws(source.files[0]) == [b"one"]
    assert source.files[0].name.endswith(r"/caf\xe9.parquet")
