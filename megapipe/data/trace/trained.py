"""What metrics.jsonl says of the batches that were trained."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapipe.errors import DataError
from megapipe.files import reason, shown

METRICS = "metrics.jsonl"
STEP = re.compile(rb'\{"step": (\d+),')
"""How a line begins; only lines that are wanted are parsed."""


@dataclass(frozen=True)
class Trained:
    """The hashes of the batches of some steps, and how far the run has come: its last step, and the
    furthest pass over a source that any stream had begun there."""

    hashes: dict[int, str]
    last: int
    epoch: int


def read_trained(path: Path, first: int, last: int) -> Trained:
    """Of the steps from `first` to `last`. A step that is there twice was trained again after the
    run was killed: the last line counts. Raises DataError for a file that can't be read."""
    hashes: dict[int, str] = {}
    newest = b""
    newest_step = 0
    for step, line in _lines(path):
        if step >= newest_step:
            newest, newest_step = line, step
        if first <= step <= last:
            found = _parsed(line).get("batch_hash")
            if isinstance(found, str):
                hashes[step] = found
    epoch = _parsed(newest).get("epoch", 0)
    return Trained(hashes, newest_step, epoch if isinstance(epoch, int) else 0)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines of steps; one may be torn where a run was killed."""
    try:
        with path.open("rb") as file:
            for line in file:
                if (match := STEP.match(line)) and line.endswith(b"\n"):
                    yield int(match[1]), line
    except OSError as error:
        raise DataError(
            f"{shown(path)}: can't be read: {reason(error)} A run directory has it, with the hash "
            "of each batch."
        ) from error


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
