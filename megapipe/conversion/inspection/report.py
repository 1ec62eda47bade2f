"""What `megapipe inspect` says: tables for people, JSON for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from megapipe.amounts import counted
from megapipe.checkpoint.summary import CheckpointSummary, ListedCheckpoint, TensorSummary
from megapipe.conversion.inspection.order import listing_order

if TYPE_CHECKING:  # both need torch
    from megapipe.conversion.inspection.difference import StoreDifference
    from megapipe.conversion.inspection.statistics import TensorStatistics

MAX_LINES = 20
"""Of problems, and of tensors that only one of two directories has."""


@dataclass(frozen=True)
class Report:
    """`parts` are printed one below the other, `content` is all of it for programs, and `status` is
    the exit status of the command."""

    parts: Sequence[RenderableType]
    content: Mapping[str, object]
    status: int = 0

    def json(self) -> str:
        """`content` as JSON, where infinity is null."""
        return json.dumps(_plain(self.content), indent=1, allow_nan=False) + "\n"


def report_run(root: Path, checkpoints: Sequence[ListedCheckpoint], verdict: str) -> Report:
    """All checkpoints of a run; `verdict` is for those without problems."""
    table = Table("step", "tokens", "bytes", "whole")
    for one in checkpoints:
        whole = "DAMAGED" if one.problems else verdict
        tokens, size = one.amounts
        table.add_row(str(one.step), _text(tokens), size, whole)
    problems = [problem for one in checkpoints for problem in one.problems]
    content: dict[str, object] = {
        "path": str(root),
        "kind": "run",
        "verdict": verdict,
        "checkpoints": [asdict(one) for one in checkpoints],
    }
    return Report([_text(str(root)), table, *_red(problems)], content, status=1 if problems else 0)


def report_tensors(
    found: CheckpointSummary,
    verdict: str,
    *,
    listed: bool,
    statistics: "Mapping[str, TensorStatistics] | None" = None,
) -> Report:
    """One directory; `verdict` is for one without problems. With `listed`, all tensors, with their
    `statistics` if given: values that are not finite are pointed out, but they are no damage."""
    content = {**found.content, "verdict": verdict, "problems": list(found.problems)}
    facts = Table(show_header=False, box=None)
    for name, value in found.facts:
        facts.add_row(_text(name), _text(value))
    if statistics is not None:
        bad = {name: one for name, one in statistics.items() if one.nan or one.infinite}
        facts.add_row("values", _values_verdict(bad))
        content["not_finite"] = list(bad)
    facts.add_row("whole", "NO" if found.problems else verdict)
    parts: list[RenderableType] = [_text(str(found.path)), facts, *_red(found.problems)]
    if listed:
        tensors = sorted(found.tensors, key=lambda one: listing_order(one.name))
        parts.append(_tensor_table(tensors, statistics))
        content["tensors"] = [
            asdict(one) | (asdict(statistics[one.name]) if statistics else {}) for one in tensors
        ]
    return Report(parts, content, status=1 if found.problems else 0)


def _values_verdict(bad: "Mapping[str, TensorStatistics]") -> Text:
    if not bad:
        return Text("all finite")
    nan, infinite = (sum(getattr(one, key) for one in bad.values()) for key in ("nan", "infinite"))
    amounts = [f"{nan:,} NaN"] * (nan > 0) + [f"{infinite:,} infinite"] * (infinite > 0)
    return Text(f"{' and '.join(amounts)} in {counted(len(bad), 'tensor')}", style="red")


def _tensor_table(
    tensors: Sequence[TensorSummary], statistics: "Mapping[str, TensorStatistics] | None"
) -> Table:
    table = _wide_table("dtype", "shape", "chunks")
    if statistics is not None:
        for title in ("norm", "max |x|", "mean", "not finite"):
            table.add_column(title, justify="right", no_wrap=True)
    for one in tensors:
        cells: list[str | Text] = [one.dtype, _text(str(list(one.shape))), str(one.chunks)]
        if statistics is not None:
            found = statistics[one.name]
            cells += [f"{value:.4g}" for value in (found.norm, found.largest, found.mean)]
            cells.append(f"{found.nan + found.infinite:,}")
        table.add_row(_text(one.name), *cells)
    return table


def report_difference(first: Path, second: Path, found: "StoreDifference") -> Report:
    """How the tensors of two directories differ; those that don't are only counted."""
    parts: list[RenderableType] = [_text(f"A: {first}"), _text(f"B: {second}")]
    for letter, names in (("A", found.only_first), ("B", found.only_second)):
        if names:
            parts.append(Text(f"{counted(len(names), 'tensor')} only in {letter}:"))
            parts += _listed([f"  {name}" for name in names])
    differing = [one for one in found.tensors if one.differs]
    table = _wide_table("shape", "dtype", "values that differ", "largest", "relative")
    for one in differing:
        shapes = " / ".join(dict.fromkeys(str(list(shape)) for shape in one.shapes))
        compared = one.shapes[0] == one.shapes[1]
        amounts = [
            f"{one.differing:,} of {one.values:,}",
            f"{one.largest:.3g}",
            f"{one.relative:.3g}",
        ]
        dtypes = " / ".join(dict.fromkeys(one.dtypes))
        table.add_row(_text(one.name), _text(shapes), dtypes, *(amounts if compared else "---"))
    if differing:
        parts.append(table)
    values = sum(one.differing for one in found.tensors)
    largest = max((one.largest for one in found.tensors), default=0.0)
    relative = max((one.relative for one in found.tensors), default=0.0)
    same = len(found.tensors) - len(differing)
    total = f"{counted(same, 'tensor')} the same, {len(differing):,} not"
    if values:
        total += (
            f": {counted(values, 'value')} in all, by up to {largest:.3g} (relative {relative:.3g})"
        )
    parts.append(Text(total))
    content = {
        "kind": "difference",
        "a": str(first),
        "b": str(second),
        "differs": found.differs,
        "only_in_a": list(found.only_first),
        "only_in_b": list(found.only_second),
        "differing_values": values,
        "largest": largest,
        "relative": relative,
        "tensors": [asdict(one) for one in differing],
        "same": [one.name for one in found.tensors if not one.differs],
    }
    return Report(parts, content, status=1 if found.differs else 0)


def _wide_table(*titles: str) -> Table:
    """A table of tensors in which a narrow terminal folds nothing but their names."""
    columns = (Column(title, no_wrap=True) for title in titles)
    return Table(Column("tensor", overflow="fold", min_width=12), *columns)


def _red(problems: Sequence[str]) -> list[Text]:
    return _listed(problems, "red", "problem")


def _listed(lines: Sequence[str], style: str = "", noun: str = "tensor") -> list[Text]:
    more = len(lines) - MAX_LINES
    rest = [Text(f"and {counted(more, f'more {noun}')}")] if more > 0 else []
    return [_text(line, style) for line in lines[:MAX_LINES]] + rest


def _text(value: str, style: str = "") -> Text:
    """Text as it is: no markup, and nothing that a terminal would obey."""
    return Text(value if value.isprintable() else ascii(value), style=style)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
