"""What `megapipe data trace RUN --steps A-B` prints: the rows of steps, and whether they agree."""

import argparse
import json
from typing import Any

from megapipe.config.save import write_text
from megapipe.data.trace.agreement import Agreement, Checked, agreement_lines, cause, check
from megapipe.data.trace.replay import Replay
from megapipe.data.trace.report import sample_lines, step_table
from megapipe.data.trace.rows import Describer
from megapipe.data.trace.trained import METRICS, read_trained
from megapipe.errors import DataError
from megapipe.tools.progress import count_bar


def trace_steps(replay: Replay, options: argparse.Namespace) -> int:
    """Print the rows of the steps that are asked for, and whether they are those that were trained;
    1 where one is not."""
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
        table = step_table(checked[-1])
        if not options.verify_only:
            print(f"step {step.number}")
            samples = list(describer.samples(step))
            for sample in samples:
                print("\n".join(sample_lines(sample)))
            table["samples"] = [sample.table() for sample in samples]
        tables.append(table)
    status = _say_agreement(checked, first, replay, describer)
    if options.json is not None:
        content = {"run": str(options.run), "equal": status == 0, "steps": tables}
        write_text(json.dumps(content, indent=1) + "\n", options.json)
    return status


def _say_agreement(checked: list[Checked], first: int, replay: Replay, describer: Describer) -> int:
    """Print whether the steps from `first` on are those that were trained; 1 where one is not."""
    asked = [one for one in checked if one.step >= first]
    for line in agreement_lines(asked):
        print(line)
    differs = next((one for one in checked if one.agreement is Agreement.DIFFERS), None)
    wrong = [one for one in asked if one.agreement is not Agreement.EQUAL]
    if differs is not None and wrong:
        print(cause(differs, replay, describer))
    return 1 if wrong else 0
