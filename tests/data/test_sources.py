import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapipe.data import sources
from megapipe.data.sources import (
    NO_RECORD,
    Change,
    Source,
    SourceRecord,
    check_source,
    open_source,
    repeated_files,
)
from megapipe.errors import DataError
from tests.data.samples import jsonl, source, write, write_corpus


def opened(
    path: object,
    streams: int = 4,
    changes: Sequence[Change] = (),
    record: SourceRecord = NO_RECORD,
    **fields: str,
) -> Source:
    config = source(path, **fields)
    return open_source(config, "data.sources[0]", streams, changes=changes, record=record)


def check(source: Source, limit: int = 10) -> None:
    check_source(source, lambda file, unit, address: True, max_bad_rows=limit)


def texts(source: Source) -> list[str | None]:
    """Of all rows, unit by unit."""
    return [
        source.text(file.rows, row.value)
        for cohort in source.cohorts
        for file in cohort.files
        if file.rows is not None
        for unit in file.units
        for row in file.rows.rows(unit)
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
        check(source)
    source = opened(write(tmp_path / "a.jsonl", jsonl(["", "", ""])))
    with pytest.raises(DataError, match=r"no usable row in 1 file.*3 row.*3 empty"):
        check(source)
    source = opened(write(tmp_path / "b.jsonl", b"\n\n"))
    with pytest.raises(DataError, match="no usable row"):
        check(source)


def test_a_table_without_rows_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"1 file with 0 rows: 1 file without rows\."):
        check(opened(tmp_path / "a.parquet"))


def test_a_source_with_more_bad_rows_than_allowed_before_the_first_good_one(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.jsonl", b"{\n" * 5 + jsonl(["good"])))
    check(source, limit=5)
    with pytest.raises(DataError, match=r"a\.jsonl, byte 8: malformed JSON.*max_bad_rows = 4"):
        check(source, limit=4)


def digests(source: Source) -> list[str]:
    return [cohort.digest for cohort in source.cohorts]


def test_the_digest_changes_with_the_files(tmp_path: Path) -> None:
    write_corpus(tmp_path, files=2, rows=5)
    before = digests(opened(tmp_path / "*.jsonl"))
    assert digests(opened(tmp_path / "*.jsonl")) == before
    content = bytearray((tmp_path / "1.jsonl").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "1.jsonl").write_bytes(content)  # of the same size
    edited = digests(opened(tmp_path / "*.jsonl"))
    assert edited != before
    (tmp_path / "1.jsonl").rename(tmp_path / "3.jsonl")
    renamed = digests(opened(tmp_path / "*.jsonl"))
    assert renamed not in (before, edited)
    write(tmp_path / "2.jsonl", jsonl(["x"]))
    assert digests(opened(tmp_path / "*.jsonl")) not in (before, edited, renamed)


def test_files_are_known_by_their_paths_within_the_source(tmp_path: Path) -> None:
    """So a corpus can move as a whole."""
    found = []
    for place in ("here", "there/too"):
        write_corpus(tmp_path / place / "a", files=2, rows=5)
        write_corpus(tmp_path / place / "b", files=1, rows=5)
        opened_here = opened(tmp_path / place / "**" / "*.jsonl")
        found.append(([file.key for file in opened_here.cohorts[0].files], digests(opened_here)))
    assert found[0] == found[1]
    assert found[0][0] == ["a/0.jsonl", "a/1.jsonl", "b/0.jsonl"]
    alone = opened(tmp_path / "here" / "a" / "1.jsonl")
    assert [file.key for file in alone.cohorts[0].files] == ["1.jsonl"]


# --- Files that join and leave -------------------------------------------------------------------


def keys(source: Source) -> list[tuple[int, list[str]]]:
    return [(cohort.after_step, [file.key for file in cohort.files]) for cohort in source.cohorts]


def test_files_that_join_are_cohorts_of_their_own(tmp_path: Path) -> None:
    """Though the source's own pattern matches them too, and in the order of their steps."""
    write_corpus(tmp_path, files=5, rows=5)
    later = [
        Change(0, 70, str(tmp_path / "1.jsonl"), None),
        Change(1, 50, str(tmp_path / "[34].jsonl"), None),
    ]
    found = opened(tmp_path / "*.jsonl", changes=later)
    assert keys(found) == [
        (0, ["0.jsonl", "2.jsonl"]),
        (50, ["3.jsonl", "4.jsonl"]),
        (70, ["1.jsonl"]),
    ]
    assert len(texts(found)) == 25
    alone = opened(tmp_path / "*.jsonl")
    assert not found.leaves
    assert digests(found)[0] != digests(alone)[0]


def test_files_that_leave_are_named_with_their_step(tmp_path: Path) -> None:
    write_corpus(tmp_path, files=4, rows=5)
    changes = [
        Change(0, 50, str(tmp_path / "3.jsonl"), None),
        Change(1, 90, None, str(tmp_path / "[03].jsonl")),
        Change(2, 60, None, str(tmp_path / "0.jsonl")),
    ]
    found = opened(tmp_path / "*.jsonl", changes=changes)
    assert found.leaves == {"0.jsonl": 60, "3.jsonl": 90}, "the first step at which it leaves"


@pytest.mark.parametrize("remove", ["9.jsonl", "3.jsonl"])
def test_a_change_that_takes_nothing_away_is_an_error(tmp_path: Path, remove: str) -> None:
    """No such file; or one that joins only later."""
    write_corpus(tmp_path, files=4, rows=5)
    changes = [
        Change(0, 50, str(tmp_path / "3.jsonl"), None),
        Change(1, 20, None, str(tmp_path / remove)),
    ]
    said = rf'data\.changes\[1\]\.remove = ".*{remove}" matches no file of the source "source"'
    with pytest.raises(DataError, match=said):
        opened(tmp_path / "*.jsonl", changes=changes)


def test_a_change_that_adds_nothing_is_an_error(tmp_path: Path) -> None:
    write_corpus(tmp_path, files=1, rows=5)
    change = Change(2, 50, str(tmp_path / "new*.jsonl"), None)
    with pytest.raises(DataError, match=r'data\.changes\[2\]\.add = ".*" matches no file'):
        opened(tmp_path / "*.jsonl", changes=[change])


def test_a_file_that_has_left_may_be_gone_where_it_is_on_record(tmp_path: Path) -> None:
    write_corpus(tmp_path, files=3, rows=5)
    before = opened(tmp_path / "*.jsonl")
    (tmp_path / "1.jsonl").unlink()
    change = Change(0, 50, None, str(tmp_path / "1.jsonl"))
    record = SourceRecord(before.cohorts)
    found = opened(tmp_path / "*.jsonl", changes=[change], record=record)
    assert digests(found) == digests(before)
    assert found.leaves == {"1.jsonl": 50}
    assert [file.rows is None for file in found.cohorts[0].files] == [False, True, False]
    assert len(texts(found)) == 10
    with pytest.raises(DataError, match=r"data\.changes\[0\]\.remove = .* matches no file"):
        opened(tmp_path / "*.jsonl", changes=[change])


def test_what_is_on_record_is_not_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the file is another; nothing else depends on the record."""
    write_corpus(tmp_path, files=3, rows=5)
    before = opened(tmp_path / "*.jsonl")
    record = SourceRecord(before.cohorts)
    write(tmp_path / "1.jsonl", (tmp_path / "1.jsonl").read_bytes()[:-1] + b" ")
    looked: list[str] = []
    units = sources.TextFile.units

    def look(self: sources.TextFile) -> object:
        looked.append(self.path.name)
        return units(self)

    monkeypatch.setattr(sources.TextFile, "units", look)
    again = opened(tmp_path / "*.jsonl", record=record)
    assert looked == ["1.jsonl"]
    assert digests(again) == digests(opened(tmp_path / "*.jsonl"))


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
    assert [row.address for row in source.files[1].rows()] == list(range(10))
    assert all(file.units.whole for cohort in source.cohorts for file in cohort.files)
    check(source)
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
        open_source(source(place), f"data.sources[{index}]", 4)
        for index, place in enumerate((tmp_path / "*.jsonl", path))
    ]
    assert list(repeated_files(sources)) == [
        "data.sources[0].path: passed over 1 further name of files that are read already, such "
        f"as {tmp_path}/c.jsonl.",
        f"data.sources[1].path: shares 1 file with data.sources[0].path, such as {path}. What both "
        "have is read for both.",
    ]
