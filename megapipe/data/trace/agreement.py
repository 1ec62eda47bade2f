"""Whether steps that were read again are those that were trained, and why not."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby

from megapipe.data.trace.replay import Replay, ReplayedStep
from megapipe.data.trace.rows import Describer, files_of
from megapipe.files import shown

NAMED = 5
"""Files that a message names."""


class Agreement(Enum):
    """Of a step."""

    EQUAL = "equal to what was trained"
    DIFFERS = "DIFFERS from what was trained"
    MISSING = "not in metrics.jsonl"


@dataclass(frozen=True)
class Checked:
    """A step, its hash, and that of what was trained, None where metrics.jsonl lacks the step. Of
    one that differs also the files that it read: source and key."""

    step: int
    hash: str
    trained: str | None
    files: frozenset[tuple[str, str]] = frozenset()

    @property
    def agreement(self) -> Agreement:
        if self.trained is None:
            return Agreement.MISSING
        return Agreement.EQUAL if self.hash == self.trained else Agreement.DIFFERS


def check(step: ReplayedStep, trained: Mapping[int, str]) -> Checked:
    """Compare a step with the hashes of those that were trained."""
    checked = Checked(step.number, f"{step.batch.hash:016x}", trained.get(step.number))
    if checked.agreement is not Agreement.DIFFERS:
        return checked
    return replace(checked, files=frozenset(files_of(step)))


def agreement_lines(checked: Sequence[Checked]) -> list[str]:
    """A line for each run of steps that agree or differ alike."""
    lines = []
    for agreement, group in groupby(checked, key=lambda one: one.agreement):
        steps = list(group)
        line = f"{_range(steps[0].step, steps[-1].step)}: {agreement.value}"
        if agreement is Agreement.DIFFERS:
            line += f" (hash {steps[0].hash}, trained {steps[0].trained})"
        lines.append(line)
    return lines


def cause(differs: Checked, replay: Replay, describer: Describer) -> str:
    """Why a step, the first that differs, may do so: files that are gone, or that it read and that
    were written since; where there are none, all that it read."""
    gone = list(_gone(replay, describer, differs.step))
    if gone:
        return (
            f"Step {differs.step} is the first that differs. {_some(gone)} had not left by then, "
            "and can't be read any more: put a copy back."
        )
    trained_at = replay.kept_at(differs.step)
    paths = [describer.path(*file) for file in sorted(differs.files)]
    written = [path for path in paths if _written(path) > trained_at]
    if written:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(_written(written[0])))
        return (
            f"Step {differs.step} is the first that differs. Of the files that it read, "
            f"{_some(written)} changed after it was trained ({when}). Restore what was there."
        )
    return (
        f"Step {differs.step} is the first that differs. It read {_some(paths)}: compare them with "
        "a copy, since one of them may have other content than it had."
    )


def _gone(replay: Replay, describer: Describer, step: int) -> Iterator[str]:
    """Files that a step may have read and that are not on the disk."""
    for source in replay.feed.sources:
        for cohort in source.cohorts:
            yield from (
                describer.path(source.name, file.key)
                for file in cohort.files
                if file.rows is None and source.leaves.get(file.key, step) >= step
            )


def _written(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:  # on the hub, or gone
        return 0.0


def _range(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first}-{last}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more
