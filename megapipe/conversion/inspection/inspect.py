"""What `megapipe inspect` does with a path, or with two."""

from pathlib import Path
from typing import TYPE_CHECKING

from megapipe.checkpoint.steps import committed
from megapipe.checkpoint.summary import (
    Bar,
    CheckpointSummary,
    find_checkpoints,
    list_checkpoints,
    summarize_checkpoint,
)
from megapipe.conversion.inspection.report import (
    Report,
    report_difference,
    report_run,
    report_tensors,
)
from megapipe.conversion.kind import OTHER_STACKS, kind_of
from megapipe.errors import UsageError
from megapipe.files import shown

if TYPE_CHECKING:  # which needs torch
    from megapipe.conversion.model_at import Families


def report_one(
    path: Path, families: "Families", *, read: bool, tensors: bool, stats: bool, bar: Bar
) -> Report:
    """On a checkpoint, all of a run's, or another stack's directory, whose model is one of the
    `families` if it is known.

    With `read`, every byte that has a checksum is verified. `tensors` lists them, `stats` adds what
    their values are like. Raises CheckpointError or ConversionError where there is nothing to read.
    """
    root = find_checkpoints(path)
    if root is not None:
        if tensors or stats:
            _refuse_run(root, "--stats" if stats else "--tensors")
        return report_run(root, list_checkpoints(root, read=read, bar=bar), _verdict(read))
    other = _other_stack(path, families) if kind_of(path) in OTHER_STACKS else None
    summary = other or summarize_checkpoint(path, read=read, bar=bar)
    verdict = "sizes agree, the format has no checksums" if other else _verdict(read)
    if not stats or summary.problems:
        return report_tensors(summary, verdict, listed=tensors or stats)

    from megapipe.conversion.inspection.open import open_tensors, tensor_bytes
    from megapipe.conversion.inspection.statistics import statistics_of

    store = open_tensors(path)
    with bar("reading", tensor_bytes(store)) as progress:
        statistics = statistics_of(store, progress)
    return report_tensors(summary, verdict, listed=True, statistics=statistics)


def report_two(first: Path, second: Path, families: "Families", bar: Bar) -> Report:
    """On how the tensors of two directories differ; of another stack's and a checkpoint, under the
    names that the `families` give them. Raises CheckpointError or ConversionError where one can't
    be read."""
    for path in (first, second):
        root = find_checkpoints(path)
        if root is not None:
            _refuse_run(root, "--diff")

    from megapipe.conversion.inspection.difference import common_bytes, compare_tensors
    from megapipe.conversion.inspection.open import open_pair

    one, other = open_pair(first, second, families)
    with bar("comparing", common_bytes(one, other)) as progress:
        return report_difference(first, second, compare_tensors(one, other, progress))


def _other_stack(path: Path, families: "Families") -> CheckpointSummary:
    from megapipe.conversion.inspection.open import summarize_other_stack

    return summarize_other_stack(path, families)


def _refuse_run(root: Path, option: str) -> None:
    newest = next(iter(committed(root).values()))
    raise UsageError(
        f"{option} is for single checkpoints, and {shown(root)} holds all of a run's. Name one, "
        f"such as {shown(newest)}."
    )


def _verdict(read: bool) -> str:
    return "yes, every byte verified" if read else "sizes agree, bytes not read"
