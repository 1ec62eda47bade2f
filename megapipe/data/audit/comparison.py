"""Whether an audit is still of the data that a run reads."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megapipe.amounts import counted, scaled
from megapipe.config import Config
from megapipe.data.audit.findings import AUDIT_FILE, audit_settings, row_bytes_of
from megapipe.data.exclusions import Exclusions
from megapipe.data.order.keys import ORDER_VERSION
from megapipe.data.order.record import reading_of
from megapipe.data.sources import Source
from megapipe.data.tokenizer import Tokenizer
from megapipe.files import shown


def audit_line(
    config: Config,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    exclusions: Exclusions | None,
) -> str | None:
    """What a start says of the audit beside the run: a warning where something has changed since.
    None where there is no audit."""
    saved = _read(Path(config.train.run_dir) / AUDIT_FILE)
    if saved is None:
        return None
    settings = audit_settings(
        tokenizer.sha256,
        config.train.seed,
        config.data.validation_fraction,
        exclusions.digest if exclusions else None,
    )
    try:
        return _line(saved, settings, sources)
    except (KeyError, TypeError, ValueError, AttributeError):
        return "Warning: the run's audit can't be understood; run `megapipe data audit` again"


def _read(path: Path) -> Any:
    """None where there is none; {} where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except OSError:
        return None
    except ValueError:
        return {}


def _line(saved: Any, settings: Mapping[str, Any], sources: Sequence[Source]) -> str:
    audited = {one["name"]: one for one in saved["sources"] if one["trained"]}
    tokens = sum(one["tokens"] for one in audited.values())
    found = "; ".join([*_changed_settings(saved, settings), *_changed_sources(audited, sources)])
    of = f"{scaled(tokens)} tokens in an epoch, counted by the audit of {saved['made'][:10]}"
    if not found:
        return f"  {of}, whose files are those of today"
    return f"  Warning: {of}, and since then: {found}. Run `megapipe data audit` again"


def _changed_settings(saved: Any, settings: Mapping[str, Any]) -> Iterator[str]:
    if saved["order"] != ORDER_VERSION:
        yield "the rule of the order has changed"
    for key, value in settings.items():
        if saved["settings"].get(key) != value:
            yield f"{key} has changed"


def _changed_sources(audited: Mapping[str, Any], sources: Sequence[Source]) -> Iterator[str]:
    names = {source.name for source in sources}
    for gone in sorted(audited.keys() - names):
        yield f'"{gone}" is gone'
    for source in sources:
        one = audited.get(source.name)
        if one is None:
            yield f'"{source.name}" is new'
        elif one["reading"] != reading_of(source.config):
            yield f'"{source.name}" is read in another way'
        elif one["row_bytes"] != row_bytes_of(source):
            yield f'large files of "{source.name}" are cut in another way (data.streams)'
        else:
            yield from _changed_files(source, one["each_file"])


def _changed_files(source: Source, saved: Sequence[Any]) -> Iterator[str]:
    before = {key: (size, mark) for key, size, mark, _ in saved}
    now = {
        shown(file.key): (file.size, file.mark)
        for cohort in source.cohorts
        for file in cohort.files
    }
    both = before.keys() & now.keys()
    kinds = {
        ("has changed", "have changed"): [key for key in both if before[key] != now[key]],
        ("is new", "are new"): now.keys() - before.keys(),
        ("is gone", "are gone"): before.keys() - now.keys(),
    }
    for (one, several), keys in kinds.items():
        if keys:
            verb = one if len(keys) == 1 else several
            yield f'{counted(len(keys), "file")} of "{source.name}" {verb}, such as {min(keys)}'
