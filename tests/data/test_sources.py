import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapipe.config import SourceConfig
from megapipe.data import sources
from megapipe.data.sources import Source, check_source, open_source, repeated_files
from megapipe.errors import DataError
from tests.data.samples import jsonl, write, write_corpus


def opened(path: object, streams: int = 4, **fields: str) -> Source:
    return open_source(SourceConfig(path=str(path), **fields), "data.sources[0]", streams)  # type: ignore[arg-type]


def block_rows(source: Source, streams: int = 4, shuffle_block: int = 100, limit: int = 10) -> int:
    return check_source(
        source,
        lambda file, row: True,
        streams=streams,
        shuffle_block=shuffle_block,
        max_bad_rows=limit,
    )


def texts(source: Source) -> list[str | None]:
    return [
        source.text(index, raw)
        for index, file in enumerate(source.files)
        for raw, _ in file.rows(0, 0)
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none/*.txt", r'data\.sources\[0\]\.path = ".*none/\*\.txt" matches no file'),
        ("", "is a directory; name files in it"),
        ("a.bin", r'the format of .*a\.bin can\'t be told.*data\.sources\[0\]\.format = "text"'),
        ("a.parquet.gz", "the format of"),
    ],
)
def test_paths_that_can_not_be_read(tmp_path: Path, path: str, message: str) -> None:
    write(tmp_path / "a.bin", b"x")
    write(tmp_path / "a.parquet.gz", b"x")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / path if path else tmp_path)


def test_the_format_can_be_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.log", jsonl(["one", "two"]))
    assert texts(opened(path, format="jsonl")) == ["one", "two"]
    assert len(texts(opened(path, format="text"))) == 1


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", ["one\ntwo\n\nthree\n"]),
        ("line", ["one", "two", None, "three"]),
        ("blank-line", ["one\ntwo", "three"]),
    ],
)
def test_documents_of_text_files(
    tmp_path: Path, suffix: str, documents: str, expected: list[str | None]
) -> None:
    path = write(tmp_path / f"a.txt{suffix}", b"one\ntwo\n\nthree\n")
    assert texts(opened(path, documents=documents)) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines_under_another_field(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b'{"body": "one"}\n\n{"body": "two"}')
    assert texts(opened(path, text_field="body")) == ["one", None, "two"]


def test_a_single_large_text_file_is_cut_for_the_streams(tmp_path: Path) -> None:
    content = b"".join(b"line %d\n" % n for n in range(100_000))
    source = opened(write(tmp_path / "a.txt", content))
    found = texts(source)
    assert "".join(text or "" for text in found) == content.decode()
    assert 4 <= len(found) <= 20
    assert all((text or "").endswith("\n") for text in found)


def test_a_source_without_text_is_an_error_that_names_its_key(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.txt", b""))
    with pytest.raises(
        DataError, match=r"data\.sources\[0\]\.path = .* no usable row.*0 row.*1 file"
    ):
        block_rows(source)
    source = opened(write(tmp_path / "a.jsonl", jsonl(["", "", ""])))
    with pytest.raises(DataError, match=r"no usable row in 1 file.*3 row.*3 empty"):
        block_rows(source)
    source = opened(write(tmp_path / "b.jsonl", b"\n\n"))
    with pytest.raises(DataError, match="no usable row"):
        block_rows(source)


def test_a_table_without_rows_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"1 file with 0 rows: 1 file without rows\."):
        block_rows(opened(tmp_path / "a.parquet"))


def test_a_source_with_more_bad_rows_than_allowed_before_the_first_good_one(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.jsonl", b"{\n" * 5 + jsonl(["good"])))
    assert block_rows(source, limit=5) == 1
    with pytest.raises(DataError, match=r"a\.jsonl, row 5: malformed JSON.*max_bad_rows = 4"):
        block_rows(source, limit=4)


def test_small_sources_get_smaller_blocks(
    tmp_path: Path,
) -> None:
    write_corpus(tmp_path, files=2, rows=50)
    source = opened(tmp_path / "*.jsonl")
    assert block_rows(source, streams=4, shuffle_block=25) == 25
    assert block_rows(source, streams=4, shuffle_block=26) == 25
    assert block_rows(source, streams=16, shuffle_block=100) == 6
    assert block_rows(source, streams=1000, shuffle_block=100) == 1


def test_the_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    write_corpus(tmp_path, files=2, rows=5)
    before = opened(tmp_path / "*.jsonl").fingerprint
    assert opened(tmp_path / "*.jsonl").fingerprint == before
    assert opened(tmp_path / "*.jsonl", text_field="body").fingerprint != before
    write(tmp_path / "2.jsonl", jsonl(["x"]))
    assert opened(tmp_path / "*.jsonl").fingerprint != before


def test_hub_names_are_streamed_shard_by_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    for part in range(3):
        rows = [f"{part} {n}" for n in range(10)]
        pq.write_table(pa.table({"text": rows, "id": range(10)}), tmp_path / f"{part}.parquet")
    files = [str(tmp_path / f"{part}.parquet") for part in range(3)]
    local = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    asked: list[object] = []

    def load(name: str, subset: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, subset, split, streaming))
        return local

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = opened("hf://org/name/subset:validation")
    assert asked == [("org/name", "subset", "validation", True)]
    assert texts(source) == [f"{part} {n}" for part in range(3) for n in range(10)]
    assert [raw for raw, _ in source.files[1].rows(7, 0)] == [b"1 7", b"1 8", b"1 9"]
    assert block_rows(source, streams=5) == 6
    with pytest.raises(DataError, match=r'text_field = "body" is not a column.*text, id'):
        opened("hf://org/name", text_field="body")
    with pytest.raises(DataError, match="is not of the form"):
        opened("hf://name")


def test_a_hub_that_can_not_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*arguments: object, **options: object) -> object:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.path = .*no route.*reachable"):
        opened("hf://org/name")


def test_of_several_files_that_can_not_be_read_the_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they are looked into several at a time, and the last error comes first."""
    for number in range(300):
        write(tmp_path / f"{number:03}.jsonl", jsonl(["text"]))
    last = threading.Event()

    def check(path: Path, form: str, size: int) -> None:
        if path.name == "007.jsonl":
            assert last.wait(60), "the files are looked into one after the other"
        if path.name == "299.jsonl":
            last.set()
        if path.name in ("007.jsonl", "100.jsonl", "299.jsonl"):
            raise DataError(f"{path.name} is damaged")

    monkeypatch.setattr(sources, "check_content", check)
    with pytest.raises(DataError, match=r"^007\.jsonl is damaged"):
        opened(tmp_path / "*.jsonl")


def test_files_are_in_sorted_order(tmp_path: Path) -> None:
    for number in range(300):
        write(tmp_path / f"{number:03}.jsonl", jsonl([f"text {number}"]))
    assert texts(opened(tmp_path / "*.jsonl")) == [f"text {number}" for number in range(300)]


def test_files_with_several_names_and_in_several_sources_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", jsonl(["text"]))
    (tmp_path / "c.jsonl").symlink_to("b.jsonl")
    sources = [
        open_source(SourceConfig(path=str(place)), f"data.sources[{index}]", 4)
        for index, place in enumerate((tmp_path / "*.jsonl", path))
    ]
    assert list(repeated_files(sources)) == [
        "data.sources[0].path: passed over 1 further name of files that are read already, such "
        f"as {tmp_path}/c.jsonl.",
        f"data.sources[1].path: shares 1 file with data.sources[0].path, such as {path}. What both "
        "have is read for both.",
    ]
