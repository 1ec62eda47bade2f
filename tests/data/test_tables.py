"""Tables are read from the very file, unit by unit, and what is odd is reported by name."""

import gzip
import subprocess
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapipe.data.formats import DAMAGED, NoRows, RowFile
from megapipe.data.sources import open_source
from megapipe.data.splitters import Raw, Unreadable
from megapipe.data.tables import HubShard
from megapipe.errors import DataError
from tests.data.samples import source as source_config

NAMES = ["a.parquet", "a.arrow", "a.stream.arrow"]
TEXTS = [f"row {n}" for n in range(1000)]


def raws(file: RowFile) -> list[object]:
    return [row.value for row in file.rows()]


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
    source = open_source(source_config(path, text_field=field), "data.sources[0]", 1)
    return source.files[0]


def texts(path: Path) -> list[str | None]:
    source = open_source(source_config(path), "data.sources[0]", 1)
    return [source.text(source.files[0], raw) for raw in raws(source.files[0])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [100, 300, 1000])
def test_every_row_of_a_table_belongs_to_one_unit(tmp_path: Path, name: str, group: int) -> None:
    table = pa.table({"id": range(1000), "text": TEXTS, "text.more": ["no"] * 1000})
    file = opened(write_table(tmp_path / name, table, group))
    expected = [Raw(text.encode(), row) for row, text in enumerate(TEXTS)]
    assert list(file.rows()) == expected
    units = file.units()
    assert not units.whole
    assert len(units) == -(-1000 // group)
    for unit in reversed(units):
        start, end = (unit.start, unit.end) if len(units) > 1 else (0, 1000)
        assert list(file.rows(unit)) == expected[start:end]
    assert file.place(units[0], 999) == "row 1,000"


def test_row_groups_without_rows_are_no_units(tmp_path: Path) -> None:
    some, none = pa.table({"text": ["one", "two"]}), pa.table({"text": pa.array([], pa.string())})
    with pq.ParquetWriter(tmp_path / "a.parquet", some.schema) as writer:
        for part in (none, some, none, some):
            writer.write_table(part)
    file = opened(tmp_path / "a.parquet")
    assert [(unit.start, unit.end) for unit in file.units()] == [(0, 2), (2, 4)]
    assert raws(file) == [b"one", b"two"] * 2


def test_the_size_of_a_unit_is_that_of_its_text(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{n} " * 100 for n in range(1000)], "id": range(1000)})
    size = sum(len(text) for text in table["text"].to_pylist())
    for name in NAMES:
        units = opened(write_table(tmp_path / name, table, 500)).units()
        assert sum(unit.size for unit in units) == pytest.approx(size, rel=0.1)


COLUMNS: dict[str, Any] = {
    "string": pa.array(TEXTS),
    "large string": pa.array(TEXTS, pa.large_string()),
    "string view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array([text.encode() for text in TEXTS], pa.binary()),
    "large binary": pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of views": pa.DictionaryArray.from_arrays(
        range(1000), pa.array(TEXTS, pa.string_view())
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_that_hold_text(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "dictionary of views" and name == "a.parquet":
        pytest.skip("pyarrow can't write it")
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


LONG = [(text * 40).encode() for text in TEXTS]


def test_a_damaged_row_group_loses_no_other(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", pa.table({"text": LONG}), 250)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content[start : start + 400] = bytes(400)
    path.write_bytes(content)
    found = raws(opened(path))
    damage = found[500]
    assert found == [*LONG[:500], damage, *LONG[750:]]
    assert isinstance(damage, Unreadable)
    assert damage.detail.startswith("its rows 501 to 750 can't be read (")


@pytest.mark.parametrize("name", ["a.arrow", "a.stream.arrow"])
def test_rows_in_front_of_damage_are_kept(tmp_path: Path, name: str) -> None:
    """Where nobody knows any more where record batches begin, the rest of the file is lost."""
    path = write_table(tmp_path / name, pa.table({"text": LONG}), 250)
    content = bytearray(path.read_bytes())
    if name == "a.stream.arrow":
        del content[len(content) // 2 :]
    else:  # the header of the third record batch, by the length that each begins with
        places = list(find_all(bytes(content), b"\xff\xff\xff\xff"))
        content[places[3] + 4 : places[3] + 400] = bytes(396)
    path.write_bytes(content)
    assert len(opened(path).units()) == 1
    *before, last = raws(opened(path))
    assert before == LONG[:500] if name == "a.arrow" else LONG[:250]
    assert isinstance(last, Unreadable)
    assert f"bytes with its rows from {len(before) + 1} on can't be read (" in last.detail
    assert f"{last.file_bytes:,} bytes" in last.detail
    assert 0 < last.file_bytes < 0.55 * len(content)


@pytest.mark.parametrize("name", ["a.arrow", "a.stream.arrow"])
def test_an_arrow_file_that_can_not_be_opened_says_its_size(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, pa.table({"text": TEXTS}))
    content = path.read_bytes()[:100]
    path.write_bytes(content)
    (row,) = raws(opened(path))
    assert isinstance(row, Unreadable)
    assert "none of its 100 bytes can be read" in row.detail
    assert row.file_bytes == 100


FLIP_BITS = """
import random, sys
from pathlib import Path
from megapipe.data.tables import LocalTable
from megapipe.errors import DataError

path, odd = Path(sys.argv[1]), Path(sys.argv[2])
whole = path.read_bytes()
outcomes = set()
for seed in range(250):
    chance, content = random.Random(seed), bytearray(whole)
    for _ in range(chance.choice([1, 1, 4])):
        content[chance.randrange(8, len(content))] ^= 1 << chance.randrange(8)
    odd.write_bytes(content)
    table = LocalTable(odd, "arrow", chance.choice(["text", "word"]), len(content))
    try:
        table.check()
        rows = [row.value for row in table.rows()]
        assert rows, seed
        outcomes.add(type(rows[-1]).__name__)
    except DataError:
        outcomes.add("refused")
print(*sorted(outcomes))
"""


@pytest.mark.parametrize("name", ["a.arrow", "a.stream.arrow"])
def test_no_flipped_bit_of_an_arrow_file_ends_the_process(tmp_path: Path, name: str) -> None:
    words = pa.array([f"w{n % 5}" for n in range(1000)]).dictionary_encode()
    table = pa.table({"text": [text * (n % 7) for n, text in enumerate(TEXTS)], "word": words})
    path = write_table(tmp_path / name, table, 300)
    done = subprocess.run(
        [sys.executable, "-c", FLIP_BITS, path, tmp_path / "odd.arrow"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert {"Unreadable", "bytes"} <= set(done.stdout.split())


@pytest.mark.parametrize("name", ["a.arrow", "a.stream.arrow"])
def test_offsets_that_point_outside_are_damage_of_one_record_batch(
    tmp_path: Path, name: str
) -> None:
    path = write_table(tmp_path / name, pa.table({"text": TEXTS}), 100)
    content = bytearray(path.read_bytes())
    offsets = pa.array(TEXTS[700:800]).buffers()[1].to_pybytes()[:400]
    place = content.rfind(offsets, 0, content.find(b"row 700"))
    content[place + 40 : place + 44] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    found = raws(opened(path))
    damage = found[700]
    kept = [text.encode() for text in TEXTS]
    assert found == [*kept[:700], damage, *kept[800:]]
    assert isinstance(damage, Unreadable)
    assert damage.detail.startswith("its rows 701 to 800 can't be read (")
    assert 100 * len("row 700") < damage.file_bytes < len(content) / 5, "that of the batch"


@pytest.mark.parametrize("name", ["a.arrow", "a.stream.arrow"])
def test_bytes_that_are_not_utf8_are_one_row_and_no_damage(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, pa.table({"text": ["one", "caf??", "two"]}))
    path.write_bytes(path.read_bytes().replace(b"caf??", b"caf\xe9!"))
    assert raws(opened(path)) == [b"one", b"caf\xe9!", b"two"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (pa.ArrowMemoryError("malloc of size 99"), "not enough memory to read it .malloc of size"),
        (pa.ArrowNotImplementedError("no such type"), "pyarrow can't read it .no such type"),
        (MemoryError(), "not enough memory to read it .MemoryError"),
        (OSError(5, "Input/output error"), "can't be read: Input/output error"),
    ],
)
def test_what_is_not_the_files_fault_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    file = opened(write_table(tmp_path / "a.arrow", pa.table({"text": TEXTS})))

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pa.ipc, "open_stream", fail)
    with pytest.raises(DataError, match=rf"a\.arrow: .*{said}"):
        raws(file)


class BrokenShard:
    """A shard of `datasets` whose reading raises `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def skip(self, row: int) -> "BrokenShard":
        return self

    with_format = skip

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        yield pa.table({"text": ["one"]})
        raise self.error


def test_only_what_decoders_raise_is_damage_of_a_hub_shard() -> None:
    from huggingface_hub.errors import HFValidationError

    class ClientError(Exception):
        """As HTTP clients have them, which are no OSErrors."""

    for damage in (pa.ArrowInvalid("bad"), EOFError("cut"), gzip.BadGzipFile("no"), zlib.error()):
        one, last = raws(HubShard("hub", partial(BrokenShard, damage), "text"))
        assert one == b"one"
        assert isinstance(last, Unreadable)
    for error in (ClientError("gone"), HFValidationError("x"), ValueError("x")):
        with pytest.raises(DataError, match="hub: can't be read: "):
            raws(HubShard("hub", partial(BrokenShard, error), "text"))


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
    source = open_source(source_config(tmp_path / "caf*"), "data.sources[0]", 1)
    assert raws(source.files[0]) == [b"one"]
    assert source.files[0].name.endswith(r"/caf\xe9.parquet")


@pytest.mark.parametrize("share", [0.3, 1.1])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_changes_while_it_is_read_is_no_damage(
    tmp_path: Path, name: str, share: float
) -> None:
    """Its rows would be passed over, and a later start with the whole file would see others."""
    path = write_table(tmp_path / name, pa.table({"text": [f"{n} " * 200 for n in range(1000)]}))
    rows = opened(path).rows()
    next(rows)
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    with pytest.raises(DataError, match=rf"{name}: has .* bytes now and had"):
        list(rows)
