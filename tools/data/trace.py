"""`megapipe data trace RUN`: which rows a step read, and every use of a row."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapipe.config import Config, parse_config
from megapipe.config.save import write_text
from megapipe.data.trace.replay import Replay
from megapipe.data.trace.rows import Describer, RowUse, SampleUse
from megapipe.data.trace.search import Wanted
from megapipe.data.trace.trained import read_trained
from megapipe.data.trace.verdicts import Checked, RowVerdict, cause, check, verdict_lines
from megapipe.errors import DataError, UsageError
from megapipe.files import reason, shown
from megapipe.models.families import FAMILIES
from megapipe.tools.arguments import Parser, json_argument, path_argument
from megapipe.tools.data.uses import trace_rows
from megapipe.tools.progress import count_bar

_DESCRIPTION = """\
Say which rows each sample of some steps was made of, and check by the hashes in metrics.jsonl that
these are the batches that were trained (exit status 1 where not). Or say of a row when it was
trained. It takes the run directory of any layout and the sources, and no GPU: steps are read again
from the nearest position that the run has kept."""
_USAGE = """\
megapipe data trace RUN --steps A-B [--text] [--verify-only] [--json FILE]
       megapipe data trace RUN --id X | --row FILE:PLACE [--json FILE]"""
METRICS = "metrics.jsonl"
CONFIG = "resolved-config.toml"
STEPS = re.compile(r"(\d+)(?:-(\d+))?")


def run(argv: Sequence[str]) -> int:
    """Print the rows or the uses; 1 where steps are not those that were trained, or no row is
    found."""
    options = _parse(argv)
    replay = Replay(run_config(options.run), options.run)
    if options.steps is None:
        return trace_rows(replay, options.run / METRICS, options.wanted, options.json)
    return _trace_steps(replay, options)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("data trace", _DESCRIPTION)
    parser.usage = _USAGE
    parser.add_argument("run", type=path_argument, metavar="RUN", help="the directory of a run")
    parser.add_argument(
        "--steps", type=_steps, metavar="A-B", help="steps as metrics.jsonl numbers them, or one"
    )
    parser.add_argument("--text", action="store_true", help="print the text of each row too")
    parser.add_argument(
        "--verify-only", action="store_true", help="only check the steps; print no rows"
    )
    parser.add_argument("--id", metavar="X", help="every use of the rows with this id (id_field)")
    parser.add_argument(
        "--row",
        metavar="FILE:PLACE",
        help="every use of the row at a place, as --steps prints it: data/a.jsonl:4096 for a byte, "
        "data/a.parquet:12 for a row",
    )
    parser.add_argument("--json", type=json_argument, metavar="FILE", help="also write it there")
    options = parser.parse(argv)[0]
    asked = [options.steps, options.id, options.row]
    if sum(one is not None for one in asked) != 1:
        raise UsageError(
            "Name steps with --steps, or a row with --id or --row. Type `megapipe data trace "
            "--help`."
        )
    if options.steps is None and (options.text or options.verify_only):
        raise UsageError("--text and --verify-only are for --steps: leave them out.")
    if options.text and options.verify_only:
        raise UsageError("--verify-only prints no rows: leave --text out.")
    options.wanted = Wanted.of(options.id, options.row) if options.steps is None else None
    return options


def run_config(run_dir: Path) -> Config:
    """The config of a run's newest start. Raises DataError where there is none."""
    path = run_dir / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not text."
        raise DataError(
            f"{shown(path)}: can't be read: {why} Name the directory of a run (its train.run_dir)."
        ) from error
    return parse_config(text, FAMILIES, str(path))


def _trace_steps(replay: Replay, options: argparse.Namespace) -> int:
    first, last = options.steps
    begin = replay.before(first)
    trained = read_trained(options.run / METRICS, begin + 1, last)
    if last > trained.last:
        raise DataError(
            f"--steps {first}-{last}: the run has come to step {trained.last:,}. To see a later "
            "one, use `megapipe data look`."
        )
    describer = Describer(replay.feed.sources, replay.feed.tokenizer if options.text else None)
    checked: list[Checked] = []
    tables: list[dict[str, Any]] = []
    for step in replay.read(first, last, count_bar):
        checked.append(check(step, trained.hashes))
        if step.number < first:
            continue
        samples = list(describer.samples(step))
        if not options.verify_only:
            print(f"step {step.number}")
            for sample in samples:
                print("\n".join(sample_lines(sample)))
        tables.append(_table(checked[-1], samples, rows=not options.verify_only))
    status = _say_verdicts(checked, first, replay, describer)
    if options.json is not None:
        content = {"run": str(options.run), "equal": status == 0, "steps": tables}
        write_text(json.dumps(content, indent=1) + "\n", options.json)
    return status


def _say_verdicts(checked: list[Checked], first: int, replay: Replay, describer: Describer) -> int:
    """Print whether the steps from `first` on are those that were trained; 1 where one is not."""
    asked = [one for one in checked if one.step >= first]
    for line in verdict_lines(asked):
        print(line)
    differs = next((one for one in checked if one.verdict is RowVerdict.DIFFERS), None)
    wrong = [one for one in asked if one.verdict is not RowVerdict.EQUAL]
    if differs is not None and wrong:
        print(cause(differs, replay, describer))
    return 1 if wrong else 0


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


def _table(checked: Checked, samples: Sequence[SampleUse], *, rows: bool) -> dict[str, Any]:
    """JSON of a step."""
    content: dict[str, Any] = {
        "step": checked.step,
        "hash": checked.hash,
        "trained": checked.trained,
        "equal": checked.verdict is RowVerdict.EQUAL,
    }
    return content | ({"samples": [sample.table() for sample in samples]} if rows else {})


def _steps(text: str) -> tuple[int, int]:
    match = STEPS.fullmatch(text.replace(",", ""))
    if match is None:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no step, such as 7, or steps: 7-9")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}: the first step is 1, and the last must not be before the first"
        )
    return first, last
