"""What an audit warns of, and what it says would stop the run."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from megapipe.data import formats
from megapipe.data.audit import findings
from megapipe.data.audit.findings import content_of, problems, warnings
from megapipe.data.audit.report import audit_tables
from tests.data.audit.samples import audited
from tests.data.samples import data_config, document, jsonl, source, write

TEXTS = [document(number) for number in range(60)]
LONG_RUN = {"steps": 1000, "global_batch_size": 4, "sequence_length": 8}  # 32,000 tokens


def said(folder: Path, *sources: Any, train: dict[str, Any] | None = None, **data: Any) -> str:
    """All warnings, then all problems."""
    found = audited(folder, data_config(*sources, **data), **(train or {"steps": 1}))
    return "\n".join([*warnings(found), "--", *problems(found)])


def test_good_data_gives_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    assert said(tmp_path, path) == "--"


def test_files_that_cannot_be_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "SMALL_ARCHIVE", 100)
    write(tmp_path / "a.jsonl.gz", jsonl(TEXTS))
    frames = [zstandard.compress(jsonl(TEXTS[at : at + 20])) for at in (0, 20, 40)]
    (tmp_path / "b.jsonl.zst").write_bytes(frames[0])
    text = said(tmp_path, tmp_path / "*.jsonl.*")
    assert '2 files of "source0" can only be read in their own order, such as a.jsonl.gz' in text


def test_large_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "LARGE_UNIT", 100)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=20)
    assert '3 row groups, record batches or frames of "source0"' in said(
        tmp_path, tmp_path / "a.parquet"
    )


def test_repeats_damage_and_validation_text_that_is_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl([*TEXTS, *TEXTS[:5]]))
    write(tmp_path / "v.jsonl", jsonl(TEXTS[:2]))
    content = zstandard.compress(jsonl(TEXTS))[:-40]
    (tmp_path / "c.jsonl.zst").write_bytes(content)
    text = said(
        tmp_path,
        tmp_path / "a.jsonl",
        tmp_path / "c.jsonl.zst",
        source(tmp_path / "a.jsonl", "twice"),
        validation_sources=[source(tmp_path / "v.jsonl", "held-out")],
    )
    assert '5 of 65 documents of "source0" are exact repeats' in text
    assert '2 documents that "held-out" gives to validation are trained on too' in text
    assert '"source1" is damaged in 1 place: 0 bytes of its files' in text


def test_ends_of_sources(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    other = write(tmp_path / "b.jsonl", jsonl(map(str, range(9000))))
    once = source(path, "once", max_epochs=1)
    text = said(tmp_path, once, source(other, "more"), train=LONG_RUN)
    assert (
        '"once" has been read data.sources.max_epochs times behind step' in text.partition("--")[2]
    )
    (tmp_path / "scratch").rename(tmp_path / "before")
    once = source(path, "once", max_epochs=1, after_max_epochs="end")
    text = said(tmp_path, once, source(other, "more"), train=LONG_RUN)
    assert text.endswith("--")
    assert '"once" ends behind step' in text
    (tmp_path / "scratch").rename(tmp_path / "before-that")
    assert 'the run reads "often"' in said(tmp_path, source(path, "often"), train=LONG_RUN)


def test_bad_rows_above_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(TEXTS) + b"broken\n" * 3)
    text = said(tmp_path, path, max_bad_rows=2)
    assert "3 bad rows of the sources are more than data.max_bad_rows = 2 allows" in text


def test_a_wrong_field_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    text = said(tmp_path, source(path, text_field="content"))
    assert (
        '"source" has no usable row (a.jsonl, byte 0: '
        "missing field 'content': the row has 'text')" in text
    )


def test_a_validation_fraction_that_sets_nothing_aside(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one document")
    assert "data.validation_fraction = 0.001 sets no document" in said(
        tmp_path, path, validation_fraction=0.001, train={"validation_every": 5}
    )
    (tmp_path / "scratch").rename(tmp_path / "before")
    assert said(tmp_path, path, validation_fraction=0.001).endswith("--"), "nothing is validated"


def test_tables_and_json_have_the_same_figures(tmp_path: Path) -> None:
    texts = [*TEXTS, "x" * random.Random(0).randrange(900, 1000)]
    write(tmp_path / "a.jsonl", jsonl([*texts, ""]) + b"broken\n")
    found = audited(tmp_path, data_config(source(tmp_path / "a.jsonl", "web")))
    tokens = sum(len(text.encode()) + 1 for text in texts)
    (one,) = json.loads(json.dumps(content_of(found)))["sources"]
    assert (one["rows"], one["documents"], one["tokens"]) == (63, 61, tokens)
    assert sum(one["documents_by_tokens"].values()) == 61
    assert one["documents_by_tokens"]["512"] == 1
    assert one["bad_rows"]["malformed JSON"][0]["place"].startswith("byte ")
    assert one["each_file"][0][0] == "a.jsonl"
    printed = io.StringIO()
    Console(width=200, file=printed).print(*audit_tables(found), sep="\n")
    text = printed.getvalue()
    assert f"{tokens:,}" in text
    assert "malformed JSON" in text
    assert "512 to 1,023" in text
