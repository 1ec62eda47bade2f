"""Write the golden results anew, where a change is meant to change losses.

    python -m tests.golden                  results.json
    python -m tests.golden --checkpoint     the golden checkpoint, then results.json

The checkpoint usually stays: it shows that an old one can be resumed. None of this is to be run to
make a test pass; the commit says why losses changed.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.golden.runs import (
    CHECKPOINT,
    RESULTS,
    RESUMED,
    SAVED_STEP,
    SETTINGS,
    STEPS,
    Case,
    read_rows,
    resume,
    train,
)


def record(case: Case, folder: Path) -> list[dict[str, Any]]:
    """What a run logs of its steps; those behind the golden checkpoint where that is resumed."""
    resumes = case == RESUMED
    (resume if resumes else train)(case, folder)
    found = read_rows(folder)
    wanted = STEPS - SAVED_STEP if resumes else STEPS
    assert len(found) == wanted, (folder / "output.txt").read_text(encoding="utf-8")
    return found


def write_checkpoint(folder: Path) -> None:
    """Keep the checkpoint of a run that is not resumed from one."""
    train(RESUMED, folder)
    saved = folder / "run" / "checkpoints" / f"step-{SAVED_STEP:08d}"
    assert saved.is_dir(), (folder / "output.txt").read_text(encoding="utf-8")
    shutil.rmtree(CHECKPOINT, ignore_errors=True)
    shutil.copytree(saved, CHECKPOINT / saved.name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("--checkpoint", action="store_true", help="write the checkpoint too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.checkpoint:
            write_checkpoint(folder / "checkpoint")
        cases = [RESUMED if s == RESUMED.setting else Case(s, "one") for s in SETTINGS]
        results = {case.setting: record(case, folder / case.setting) for case in cases}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
