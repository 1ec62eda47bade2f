"""What `megapipe data trace RUN --id X` and `--row` print: every use of a row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapipe.amounts import counted
from megapipe.config.save import write_text
from megapipe.data.audit.workers import usable_cores
from megapipe.data.trace.replay import Replay
from megapipe.data.trace.report import pass_lines
from megapipe.data.trace.rows import Describer
from megapipe.data.trace.search import FoundRow, Wanted, find_rows, raw_of
from megapipe.data.trace.trained import METRICS, read_trained
from megapipe.data.trace.uses import Uses
from megapipe.files import shown
from megapipe.tools.progress import bytes_bar


def trace_rows(replay: Replay, run_dir: Path, wanted: Wanted, json_file: Path | None) -> int:
    """Print every use of the rows that are wanted; 1 where there is no such row."""
    uses = Uses(replay, read_trained(run_dir / METRICS, 1, 0))
    rows = find_rows(replay.feed.orders, wanted, workers=usable_cores(), bar=bytes_bar)
    tables = [_say(replay, uses, row) for row in rows]
    for line in _not_searched(replay):
        print(line)
    if not rows:
        print(f"No row has {wanted}.")
    if json_file is not None:
        write_text(json.dumps({"wanted": str(wanted), "rows": tables}, indent=1) + "\n", json_file)
    return 0 if rows else 1


def _say(replay: Replay, uses: Uses, row: FoundRow) -> dict[str, Any]:
    """Print the uses of a row as they are found; returns them as JSON."""
    source = next(one for one in replay.feed.sources if one.name == row.source)
    file, unit, raw = raw_of(source, row)
    assert file.rows is not None
    path = Describer([source]).path(source.name, file.key)
    place = file.rows.place(unit, raw.address)
    print(f"{source.name}: {shown(path)}, {place}")
    table = {"source": source.name, "file": path, "place": place}
    never = uses.never(row)
    if never:
        print(f"  {never}")
        return table | {"never": never, "passes": []}
    excluded = uses.excluded_from(row)
    for step in excluded:
        print(f"  excluded from step {step:,} on")
    passes = []
    for one in uses.of(row):
        print("\n".join(pass_lines(one)))
        passes.append(one)
    used = {use.step for one in passes for use in one.uses}
    print(f"  used in {counted(len(used), 'step')} so far")
    return table | {"excluded_from": excluded, "passes": [one.table() for one in passes]}


def _not_searched(replay: Replay) -> Sequence[str]:
    """Lines about rows that are not looked at."""
    lines = []
    for source in replay.feed.sources:
        files = [file for cohort in source.cohorts for file in cohort.files]
        gone = sum(1 for file in files if file.rows is None)
        if gone:
            lines.append(
                f"{source.name}: {counted(gone, 'file')} of it that left are gone from the disk, "
                "and not searched."
            )
        if source.config.id_field is None:
            lines.append(f"{source.name}: has no id_field, and is searched by --row only.")
    if replay.config.data.validation_sources:
        lines.append("data.validation_sources are not searched: they are never trained.")
    return lines
