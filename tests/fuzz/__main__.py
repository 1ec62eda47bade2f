"""`python -m tests.fuzz --minutes N [--seed S] [--only CHECK]`; see `--help`."""

import argparse
import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tests.fuzz.case import FEED, MEGAPIPE
from tests.fuzz.checks import CHECKS
from tests.fuzz.report import Report
from tests.fuzz.runner import ROOT, System
from tests.fuzz.worker import Worker, open_worker, work_through


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when nothing was found."""
    options = parse(argv)
    if options.worker is not None:
        return be_worker(options)
    if options.files is not None:
        return make_files(options)
    return be_master(options, argv)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, help="fixes all cases (default: drawn, and printed)")
    parser.add_argument(
        "--only", choices=CHECKS, help="only cases for this check, and its findings"
    )
    parser.add_argument("--case", type=int, help="run this one case, and keep its folder")
    parser.add_argument("--cases", type=int, help="stop after this many cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="workers (default: cores)")
    parser.add_argument("--work", type=Path, help="where to work (default: a new folder in /tmp)")
    parser.add_argument(
        "--files", type=Path, metavar="DIR", help="with --case: only make its files"
    )
    parser.add_argument(
        "--quick", action="store_true", help="no signals at random moments, few fresh starts"
    )
    parser.add_argument(
        "--megapipe", default=MEGAPIPE, help="the function that stands for megapipe"
    )
    parser.add_argument("--feed", default=FEED, help="the function that prints what the feed reads")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.files is not None and (options.case is None or options.seed is None):
        parser.error("--files needs --seed and --case")
    options.seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    is_new = options.work is None or not options.work.exists() or not any(options.work.iterdir())
    if options.worker is None and not is_new:
        parser.error(f"--work {options.work} is not empty")
    options.work = options.work or Path(tempfile.mkdtemp(prefix="megapipe-fuzz-"))
    return options


def be_master(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start workers, and print what they find as they find it."""
    jobs = 1 if options.case is not None else options.jobs
    fixed = ["--seed", str(options.seed), "--work", str(options.work), "--jobs", str(jobs)]
    words = [sys.executable, "-m", "tests.fuzz", *argv, *fixed]
    print(f"seed {options.seed}, {jobs} workers, in {options.work}", flush=True)
    report = Report()
    workers = [
        subprocess.Popen(
            [*words, "--worker", str(number)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for number in range(jobs)
    ]
    readers = [threading.Thread(target=report.read, args=(worker.stdout,)) for worker in workers]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    failed = [worker for worker in workers if worker.wait() != 0]
    print(report.table(), flush=True)
    if failed:
        print(f"{len(failed)} workers failed: see above", flush=True)
    return 1 if report.findings or failed else 0


def be_worker(options: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * options.minutes
    with _open(options, options.work / f"worker-{options.worker}") as worker:
        if options.case is not None:
            print(json.dumps(worker.run(options.case, keep=True)), flush=True)
            return 0
        numbers = itertools.count(options.worker, options.jobs)
        last = float("inf") if options.cases is None else options.cases
        work_through(worker, itertools.takewhile(lambda number: number < last, numbers), end)
    return 0


def make_files(options: argparse.Namespace) -> int:
    with _open(options, options.work) as worker:
        worker.make_files(options.case, options.files.absolute())
    return 0


def _open(options: argparse.Namespace, work: Path) -> AbstractContextManager[Worker]:
    return open_worker(
        work,
        System(options.megapipe, options.feed),
        seed=options.seed,
        only=options.only,
        quick=options.quick,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
