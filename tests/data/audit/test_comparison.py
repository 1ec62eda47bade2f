"""What a start says of an audit: nothing has changed, or what has."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megapipe.data.audit.audit import Audit
from megapipe.data.audit.comparison import audit_line
from megapipe.data.audit.findings import AUDIT_FILE, content_of
from megapipe.data.sources import open_source
from tests.data.audit.samples import audited
from tests.data.samples import data_config, jsonl, source, write


@pytest.fixture
def found(tmp_path: Path) -> Audit:
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", jsonl([name * 9]))
    found = audited(tmp_path, data_config(source(tmp_path / "*.jsonl", "web")))
    kept = tmp_path / "run" / AUDIT_FILE
    kept.parent.mkdir()
    kept.write_text(json.dumps(content_of(found)), encoding="utf-8")
    return found


def line(found: Audit) -> str:
    """What the next start says."""
    config = found.config
    sources = [
        open_source(one, f"data.sources[{index}]", config.streams)
        for index, one in enumerate(config.data.sources)
    ]
    return audit_line(config, found.tokenizer, sources, None) or ""


def test_nothing_has_changed(found: Audit) -> None:
    assert line(found).startswith("  30 tokens in an epoch, counted by the audit of 20")
    assert "Warning" not in line(found)


def test_files_that_changed_came_and_went(found: Audit, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl(["z" * 9]))
    write(tmp_path / "d.jsonl", jsonl(["d"]))
    (tmp_path / "b.jsonl").unlink()
    for part in (
        "Warning: 30 tokens",
        '1 file of "web" has changed, such as a.jsonl',
        '1 file of "web" is new, such as d.jsonl',
        '1 file of "web" is gone, such as b.jsonl',
        "Run `megapipe data audit` again",
    ):
        assert part in line(found)


def test_other_settings_and_sources(found: Audit, tmp_path: Path) -> None:
    data = found.config.data
    (web,) = data.sources
    for sources, part in (
        ((web.model_copy(update={"documents": "line"}),), '"web" is read in another way'),
        ((web.model_copy(update={"name": "new"}),), '"web" is gone; "new" is new'),
    ):
        config = found.config.model_copy(
            update={"data": data.model_copy(update={"sources": sources})}
        )
        assert part in line(replace(found, config=config))
    config = found.config.model_copy(
        update={"data": data.model_copy(update={"validation_fraction": 0.1})}
    )
    said = line(replace(found, config=config))
    assert "data.validation_fraction has changed; train.seed has changed" in said


def test_large_files_that_are_cut_in_another_way(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"words and words\n" * 9000)
    found = audited(tmp_path, data_config(source(tmp_path / "a.txt", "web"), streams=2))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / AUDIT_FILE).write_text(json.dumps(content_of(found)), encoding="utf-8")
    assert "Warning" not in line(found)
    data = found.config.data.model_copy(update={"streams": 4})
    config = found.config.model_copy(update={"data": data})
    assert 'large files of "web" are cut in another way' in line(replace(found, config=config))


def test_an_audit_that_is_no_audit(found: Audit, tmp_path: Path) -> None:
    kept = tmp_path / "run" / AUDIT_FILE
    for content in ("{", "[]", '{"sources": 3}'):
        kept.write_text(content, encoding="utf-8")
        assert "can't be understood" in line(found)
    kept.unlink()
    assert line(found) == ""
