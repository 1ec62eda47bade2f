"""The record batches of Arrow files, found without pyarrow and as pyarrow finds them."""

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data import arrow_index
from megapipe.data.arrow_index import arrow_head, arrow_units
from megapipe.data.formats import NoRows
from megapipe.data.tables import LocalTable
from megapipe.data.units import ListedUnits, Unit

FORMS = ["file", "stream"]


def written(
    path: Path,
    batches: list[pa.RecordBatch],
    form: str,
    options: pa.ipc.IpcWriteOptions | None = None,
) -> Path:
    make = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with path.open("wb") as file, make(file, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return path


def batch(first: int, rows: int) -> pa.RecordBatch:
    texts = [f"row {n}" for n in range(first, first + rows)]
    indices = pa.array([n % 3 for n in range(rows)], pa.int32())
    words = pa.DictionaryArray.from_arrays(indices, ["a", "b", "c"])
    columns = {
        "id": pa.array(range(rows), pa.int64()),
        "text": pa.array(texts, pa.string()),
        "word": words,
    }
    return pa.RecordBatch.from_pydict(columns)


def units_of(path: Path) -> ListedUnits:
    with path.open("rb") as file:
        return arrow_units(file)


def by_units(path: Path, column: str = "text") -> list[object]:
    table = LocalTable(path, "arrow", column)
    return [row.value for unit in units_of(path) for row in table.rows(unit)]


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 600), min_size=2, max_size=6), squeezed=st.booleans())
def test_each_record_batch_with_rows_is_a_unit(
    tmp_path_factory: pytest.TempPathFactory, form: str, sizes: list[int], squeezed: bool
) -> None:
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    batches = [batch(start, size) for start, size in zip(starts, sizes, strict=True)]
    options = pa.ipc.IpcWriteOptions(compression="zstd") if squeezed else None
    path = written(tmp_path_factory.mktemp("arrow") / "a.arrow", batches, form, options)
    units = units_of(path)
    assert not units.whole
    assert [(unit.start, unit.end) for unit in units] == [
        (start, start + size) for start, size in zip(starts, sizes, strict=True) if size
    ] or [(0, 0)]
    content = path.read_bytes()
    if not sum(sizes):
        assert by_units(path) == [NoRows()]
        return
    assert all(content[unit.offset : unit.offset + 4] == b"\xff\xff\xff\xff" for unit in units)
    assert by_units(path) == [b"row %d" % n for n in range(sum(sizes))]
    words = [b"abc"[n % 3 : n % 3 + 1] for size in sizes for n in range(size)]
    assert by_units(path, "word") == words


@pytest.mark.parametrize("form", FORMS)
def test_the_head_and_one_batch_are_a_stream(tmp_path: Path, form: str) -> None:
    path = written(tmp_path / "a.arrow", [batch(0, 5), batch(5, 7)], form)
    unit = units_of(path)[1]
    with path.open("rb") as file:
        head = arrow_head(file)
        file.seek(unit.offset)
        (found,) = pa.ipc.open_stream(head + file.read(unit.size))
    assert found.equals(batch(5, 7))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("small", [0, 1 << 20])
def test_one_batch_is_one_unit_whose_rows_are_shuffled_where_it_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, small: int
) -> None:
    monkeypatch.setattr(arrow_index, "SMALL", small)
    path = written(tmp_path / "a.arrow", [batch(0, 500)], form)
    units = units_of(path)
    assert list(units) == [Unit(0, 0, path.stat().st_size)]
    assert units.whole is (small == 0)
    assert by_units(path) == [b"row %d" % n for n in range(500)]


def changing(rows: int) -> Iterator[pa.RecordBatch]:
    """Batches whose dictionaries differ."""
    for n in range(3):
        words = pa.DictionaryArray.from_arrays([0] * rows, [f"word {n}"])
        yield pa.RecordBatch.from_pydict({"text": words})


def test_a_dictionary_behind_a_batch_makes_one_unit(tmp_path: Path) -> None:
    """A batch alone would be read with the dictionary of another."""
    path = written(tmp_path / "a.arrow", list(changing(2)), "stream")
    assert list(units_of(path)) == [Unit(0, 0, path.stat().st_size)]
    assert by_units(path) == [b"word 0"] * 2 + [b"word 1"] * 2 + [b"word 2"] * 2


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_cut_or_goes_on_is_one_unit(tmp_path: Path, form: str) -> None:
    path = written(tmp_path / "a.arrow", [batch(0, 5), batch(5, 7)], form)
    content = path.read_bytes()
    second = units_of(path)[1]
    for changed in (
        content[: second.offset + 50],
        content[: second.offset + second.size - 8],
        content[: second.offset] + bytes(40) + content[second.offset + 40 :],
        content[: second.offset + second.size] + b"garbage and more",
        content[:20],
        b"",
    ):
        path.write_bytes(changed)
        units = units_of(path)
        assert list(units) == [Unit(0, 0, len(changed))]


@pytest.mark.parametrize("form", FORMS)
def test_no_flipped_bit_raises_or_makes_units_outside_of_the_file(
    tmp_path: Path, form: str
) -> None:
    path = written(tmp_path / "a.arrow", [batch(0, 50), batch(50, 70)], form)
    whole = path.read_bytes()
    for seed in range(600):
        draw, content = random.Random(seed), bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            content[draw.randrange(8, len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        for unit in units_of(path):
            assert unit.start <= unit.end
            assert unit.offset + unit.size <= len(content)
