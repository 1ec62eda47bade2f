"""What a run records of its data, beside the run and in each checkpoint, and how it is compared.

A checkpoint goes on only with the order that made its batches. What the config declares for later
steps may differ from what it declared before.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megapipe.amounts import counted
from megapipe.config import SourceConfig
from megapipe.config.problems import show
from megapipe.data.order.keys import ORDER_VERSION
from megapipe.data.order.timeline import Phase
from megapipe.data.sources import NO_RECORD, Cohort, Source, SourceRecord, recorded_file
from megapipe.errors import DataError
from megapipe.files import replace_durably, shown

State = dict[str, Any]
NAMED = 3
"""Files that a message names."""

RECORD = "data-record"
"""The folder in a run directory that holds it. (People may have a folder `data` of their own.)"""

READING = ("text_field", "documents", "format")
LEAVES = "leaves"
PHASES = "phases"
SOURCES = "sources"


def identity(
    sources: Sequence[Source],
    phases: Sequence[Phase],
    excluded: Sequence[Any],
    settings: Mapping[str, object],
) -> State:
    """What the order of a run's data depends on; JSON. `settings` by their config keys."""
    return {
        "order": ORDER_VERSION,
        "settings": dict(settings),
        PHASES: [[phase.after_step, dict(phase.weights)] for phase in phases],
        "excluded": excluded,
        SOURCES: {source.name: _source_identity(source) for source in sources},
    }


def _source_identity(source: Source) -> State:
    return {
        **reading_of(source.config),
        "cohorts": [
            [
                cohort.after_step,
                len(cohort.files),
                sum(file.size for file in cohort.files),
                cohort.digest,
            ]
            for cohort in source.cohorts
        ],
        LEAVES: sorted([step, key] for key, step in source.leaves.items()),
    }


def reading_of(config: SourceConfig) -> State:
    """How files become documents."""
    return {key: getattr(config, key) for key in READING}


def check_identity(saved: State, own: State, step: int, news: Mapping[str, "News"]) -> None:
    """Raises DataError, with what to write, where a checkpoint of step `step` was made by another
    order up to there. `news`: what each source's files were and are, as far as that is known."""
    version = saved.get("order", 1)
    if version != ORDER_VERSION:
        raise DataError(
            f"the checkpoint's data was ordered by version {version} of the rule, and this "
            f"megapipe has version {ORDER_VERSION}. Take its weights into a new run with "
            "checkpoint.load_from, or go on with the megapipe that saved it."
        )
    found = [
        *_changed_settings(saved["settings"], own["settings"]),
        *_changed_phases(saved, own, step),
        *_changed_sources(saved[SOURCES], own[SOURCES], step, news),
    ]
    if found:
        text = "; ".join(found)
        end = "" if text.endswith("\n") else ". "  # lines of a config end the text
        raise DataError(
            f"the checkpoint was trained on other data: {text}{end}Or start a new run with another "
            "train.run_dir."
        )


def _changed_settings(saved: State, own: State) -> Iterator[str]:
    for key in sorted(saved | own):
        if saved.get(key) != own.get(key):
            before, now = _readable(saved.get(key)), _readable(own.get(key))
            fix = "restore that" if key == "data.tokenizer" else f"set {key} = {before}"
            yield f"{key} was {before} and is now {now}; {fix}"


def _changed_phases(saved: State, own: State, step: int) -> Iterator[str]:
    before = [phase for phase in saved[PHASES] if phase[0] < step]
    now = [phase for phase in own[PHASES] if phase[0] < step]
    if before != now:
        last = now[-1][1] if now else {}
        yield (
            f"up to step {step} its weights were {_weights(before)}, and the config has "
            f"{_weights(now)}. Restore those, and declare the new ones from here on:\n"
            f"[[data.phases]]\nafter_step = {step}\nweights = {_table(last)}\n"
        )


def _weights(phases: Sequence[Any]) -> str:
    return ", ".join(f"{_table(weights)} from step {step} on" for step, weights in phases)


def _table(weights: Mapping[str, float]) -> str:
    return "{ " + ", ".join(f"{show(name)} = {w:.6g}" for name, w in weights.items()) + " }"


def _changed_sources(
    saved: State, own: State, step: int, news: Mapping[str, "News"]
) -> Iterator[str]:
    for name in sorted(saved):
        if name not in own:
            yield (
                f'the source "{name}" is missing; put it back. To end it, leave it out of a '
                f"phase:\n[[data.phases]]\nafter_step = {step}\nweights = {{ ... }}\n"
            )
            continue
        before, now = saved[name], own[name]
        for key in READING:
            if before[key] != now[key]:
                yield (
                    f'{key} of the source "{name}" was {show(before[key])} and is now '
                    f"{show(now[key])}; set it back"
                )
        if _files_before(before, step) != _files_before(now, step):
            yield _changed_files(name, before, now, step, news.get(name))


def _files_before(source: State, step: int) -> list[Any]:
    """What joined and left before a step. (The run begins with the first cohort.)"""
    first, *later = source["cohorts"]
    joined = [cohort for cohort in later if cohort[0] < step]
    return [first, joined, [entry for entry in source[LEAVES] if entry[0] < step]]


def _changed_files(name: str, before: State, now: State, step: int, news: "News | None") -> str:
    text = (
        f'the files of the source "{name}" were {_files(before["cohorts"])} and are now '
        f"{_files(now['cohorts'])}"
    )
    if news is None:
        return f"{text}; restore them"
    if news.changed:
        return f"{text}; {_some(news.changed)} changed: restore what was there"
    lines = [f"[[data.changes]]\nafter_step = {step}\nsource = {show(name)}\n"]
    if news.new:
        text += f"; new: {_some(news.new)}"
        lines += [f'add = "{news.new[0]}"\n' if len(news.new) == 1 else 'add = "..."\n']
    if news.gone:
        text += f"; gone: {_some(news.gone)}"
        lines += [f'remove = "{news.gone[0]}"\n' if len(news.gone) == 1 else 'remove = "..."\n']
    if len(lines) == 1:
        return f"{text}; changes up to step {step} have to stay as they were"
    return f"{text}. Put them back, or declare the change:\n{''.join(lines)}"


def _files(cohorts: Sequence[Any]) -> str:
    return " and ".join(
        f"{counted(files, 'file')} of {size:,} bytes ({digest[:8]})"
        + (f" from step {step} on" if step else "")
        for step, files, size, digest in cohorts
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more


def _readable(value: object) -> str:
    """A value for people: of a hash its beginning."""
    return re.sub(r"\(([0-9a-f]{12})[0-9a-f]+\)", r"(hash of the content: \1)", show(value))


class News:
    """How the files of a source differ from those recorded: paths of new, gone and changed ones."""

    def __init__(self, source: Source, record: SourceRecord) -> None:
        before = {file.key: file for cohort in record.cohorts for file in cohort.files}
        now = {file.key: file for cohort in source.cohorts for file in cohort.files}
        self.new = [str(source.root / key) for key in sorted(now.keys() - before.keys())]
        self.gone = [str(source.root / key) for key in sorted(before.keys() - now.keys())]
        self.changed = [
            str(source.root / key)
            for key in sorted(before.keys() & now.keys())
            if (before[key].size, before[key].mark) != (now[key].size, now[key].mark)
        ]


def read_record(directory: Path | None, config: SourceConfig) -> SourceRecord:
    """What an earlier start found of a source's files; nothing where there is no record, or one
    of files that were read in another way."""
    if directory is None:
        return NO_RECORD
    try:
        state = json.loads((directory / f"{config.name}.json").read_bytes())
        if state["order"] != ORDER_VERSION or state["reading"] != reading_of(config):
            return NO_RECORD
        cohorts = tuple(
            Cohort(step, tuple(map(recorded_file, files))) for step, files in state["cohorts"]
        )
        return SourceRecord(cohorts)
    except (OSError, ValueError, KeyError, TypeError):
        return NO_RECORD


def write_record(directory: Path, source: Source) -> None:
    """Keep what was found of a source's files."""
    state = {
        "order": ORDER_VERSION,
        "reading": reading_of(source.config),
        "cohorts": [
            [cohort.after_step, [file.state() for file in cohort.files]]
            for cohort in source.cohorts
        ],
    }
    directory.mkdir(parents=True, exist_ok=True)
    content = json.dumps(state, separators=(",", ":")).encode()
    replace_durably(directory / f"{source.name}.json", [content])
