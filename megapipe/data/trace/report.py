"""What traces print, and the same as JSON."""

import json
from typing import Any

from megapipe.data.trace.agreement import Agreement, Checked
from megapipe.data.trace.rows import RowUse, SampleUse
from megapipe.data.trace.uses import Pass
from megapipe.files import shown


def sample_lines(sample: SampleUse) -> list[str]:
    """The rows of a sample, a line each, and their texts where they were asked for."""
    lines = [f"  sample {sample.place} (number {sample.number:,} of the run)"]
    for row in sample.rows:
        lines.append(row_line(row))
        if row.text is not None:
            lines.append(f"      {json.dumps(row.text, ensure_ascii=False)}")
    return lines


def row_line(row: RowUse) -> str:
    """What a sample has of a row, in a line."""
    part = row.part
    if part in ("middle", "end"):
        behind = f", character {row.character:,}" if row.character else ""
        part = f"{part} of it, from token {row.token:,}{behind} on"
    name = "" if row.id is None else f", id {shown(row.id)}"
    tokens = f"{row.start}-{row.end - 1}"
    return (
        f"    tokens {tokens:<11} {row.source}: {shown(row.file)}, {row.place}{name}, "
        f"epoch {row.epoch}: {part}"
    )


def step_table(checked: Checked) -> dict[str, Any]:
    """JSON of a step, without its samples."""
    return {
        "step": checked.step,
        "hash": checked.hash,
        "trained": checked.trained,
        "equal": checked.agreement is Agreement.EQUAL,
    }


def pass_lines(one: Pass) -> list[str]:
    """What became of a row in one pass over its source."""
    if not one.uses:
        return [f"  epoch {one.epoch}: {one.why}"]
    return [
        f"  epoch {one.epoch}: step {use.step:,}, sample {use.place} (number {use.number:,} of the "
        f"run), tokens {use.row.start}-{use.row.end - 1}: {use.row.part}"
        for use in one.uses
    ]
