"""metrics.jsonl: the truth about a run, one JSON object for each optimizer step.

A line reaches the kernel in one write at the end of its step, so a run that is killed loses at most
the step under way, and perhaps leaves a torn line. The next start moves that line to
metrics-replaced.jsonl, and with it the lines after step k where the run goes on from step k and
takes those steps again. Nothing is deleted.

A disk that is full, or a server that is away, does not stop the training: lines that can't be
written wait in memory, which is said once, and are written as soon as that is possible.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

from megapipe.amounts import counted
from megapipe.errors import MegapipeError
from megapipe.files import append_durably, replace_durably, write_all, write_reason
from megapipe.train.metrics import Metrics


@dataclass(frozen=True)
class Kept:
    """What the start of a run found in its metrics.jsonl."""

    last_step: int  # before anything was moved; 0 for none
    moved: int  # lines of later steps, and lines that can't be read


class MetricsFile:
    """Appends to metrics.jsonl, which holds strictly ascending steps."""

    def __init__(self, path: Path, step: int, event: Callable[[str], None]) -> None:
        """For a run that goes on after `step`.

        Raises MegapipeError where the file can't be written.
        """
        self.path = path
        self._event = event
        self._waiting: list[bytes] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.kept = keep_until(path, step)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise MegapipeError(
                f"{path}: can't be written: {write_reason(error)} Or choose another directory "
                "(train.run_dir)."
            ) from error
        if self.kept.moved:
            event(
                f"{path}: moved {counted(self.kept.moved, 'line')} to {replaced(path).name}: what "
                f"comes after step {step}, or can't be read."
            )

    def log(self, metrics: Metrics) -> None:
        self._waiting.append(metrics.to_json().encode() + b"\n")
        try:
            self._append(b"".join(self._waiting))
        except OSError as error:
            with suppress(OSError):  # no half line stays
                os.ftruncate(self._descriptor, self._size)
            if len(self._waiting) == 1:
                self._event(
                    f"{self.path} can't be written ({error.strerror}). Training goes on, and lines "
                    "wait in memory until they can be: free some space."
                )
        else:
            if len(self._waiting) > 1:
                self._event(f"{self.path} is written again, and no line is missing.")
            self._waiting.clear()

    def _append(self, data: bytes) -> None:
        write_all(self._descriptor, [data])
        self._size += len(data)

    def close(self, failed: bool) -> None:
        """Once only. Lines that still wait are lost, which is said."""
        try:
            if self._waiting:
                self._append(b"".join(self._waiting))
            os.fsync(self._descriptor)
        except OSError as error:
            lines = counted(len(self._waiting), "line")
            self._event(
                f"{self.path} lacks {lines} at its end, which could not be written "
                f"({error.strerror})."
            )
        finally:
            os.close(self._descriptor)


def keep_until(path: Path, step: int) -> Kept:
    """Keep the lines of steps up to `step` and move the others to `replaced(path)`.

    Steps must ascend, so a line that is there twice goes as well. A crash at any moment loses no
    line; between the two writes it leaves the moved lines in both files.
    """
    if not path.exists():
        return Kept(last_step=0, moved=0)
    keep, previous, last_step = bytearray(), 0, 0  # a byte for each line: runs have millions
    for line in _lines(path):
        number = _step(line) or 0
        keep.append(previous < number <= step)
        previous = number if keep[-1] else previous
        last_step = max(last_step, number)
    if not all(keep):
        moved = compress(_lines(path), (not kept for kept in keep))
        append_durably(replaced(path), (line.rstrip(b"\n") + b"\n" for line in moved))
        replace_durably(path, compress(_lines(path), keep))
    return Kept(last_step, moved=keep.count(0))


def replaced(path: Path) -> Path:
    """Where lines go that a later start of the run replaces: `metrics-replaced.jsonl`."""
    return path.with_name(f"{path.stem}-replaced{path.suffix}")


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _step(line: bytes) -> int | None:
    """None for a line that is torn or of another kind."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None
