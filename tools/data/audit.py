"""`megapipe data audit CONFIG.toml`: what a run's data holds, counted and not estimated."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megapipe.checkpoint.steps import committed
from megapipe.config.save import write_text
from megapipe.data.audit.workers import usable_cores
from megapipe.errors import UsageError
from megapipe.scratch import scratch_directory
from megapipe.tools.arguments import Parser, check_output, json_argument, path_argument, read_config
from megapipe.tools.progress import bytes_bar

_DESCRIPTION = """\
Read all data of a config once, in parallel, and count what training would see: documents and tokens
of an epoch, by the run's own tokenizer; rows that are bad, empty, excluded or set aside; exact
repeats; bytes lost in damaged files; files whose rows can't be shuffled; share and epochs of each
source in the whole run.

The result is kept in RUN/data-audit.json (RUN is train.run_dir), and a start says what has changed
since. Nothing about the order of the data depends on it. Exit status 1 where something would stop
the run."""

PIPE_COLUMNS = 160
"""Wide enough for the tables, where no terminal says how wide it is."""


def run(argv: Sequence[str]) -> int:
    """Print the tables; 1 where a problem would stop the run."""
    parser = Parser("data audit", _DESCRIPTION, overrides=True)
    parser.usage = "megapipe data audit CONFIG.toml [--section.key VALUE ...] [options]"
    parser.add_argument(
        "config", type=path_argument, metavar="CONFIG.toml", help="the config of the run"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read (default: one per core)"
    )
    parser.add_argument("--json", type=json_argument, metavar="FILE", help="also write it there")
    options, overrides = parser.parse(argv)
    workers = usable_cores() if options.workers is None else options.workers
    if workers < 1:
        raise UsageError(f"--workers {workers} must be 1 or more.")
    config = read_config(options.config, overrides)

    from megapipe.data.audit.audit import audit, keep_records
    from megapipe.data.audit.findings import AUDIT_FILE, content_of
    from megapipe.data.audit.report import audit_tables
    from megapipe.data.order.record import RECORD
    from megapipe.data.tokenizer import check_vocabulary, load_tokenizer

    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(tokenizer, config.model.vocab_size)
    run_dir = Path(config.train.run_dir)
    check_output("train.run_dir", run_dir / AUDIT_FILE)
    with scratch_directory() as scratch:
        found = audit(
            config,
            tokenizer,
            scratch=scratch,
            workers=workers,
            bar=bytes_bar,
            record=run_dir / RECORD,
        )
    content = content_of(found)
    run_dir.mkdir(parents=True, exist_ok=True)
    for path in filter(None, [run_dir / AUDIT_FILE, options.json]):
        write_text(json.dumps(content, indent=1) + "\n", path)
    if not committed(run_dir / "checkpoints"):
        keep_records(found, run_dir / RECORD)  # a run that goes on compares itself with its own
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    Console(highlight=False, soft_wrap=True, width=width).print(*audit_tables(found), sep="\n")
    print(f"Kept in {run_dir / AUDIT_FILE}")
    return 1 if content["problems"] else 0
