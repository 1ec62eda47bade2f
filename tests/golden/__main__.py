"""Write the golden results and the golden checkpoint anew: `python -m tests.golden`.

To be done where a change is meant to change losses, with the reason in its commit; never to make a
test pass.
"""

import json
import shutil
import tempfile
from pathlib import Path

from tests.golden.runs import (
    CHECKPOINT,
    RECORDED_IN,
    RESULTS,
    SAVED_STEP,
    SETTINGS,
    STEPS,
    Case,
    read_rows,
    train,
)


def record(setting: str, folder: Path) -> list[dict[str, object]]:
    """The rows of a setting's run, which stays in `folder`."""
    train(Case(setting, RECORDED_IN.get(setting, "one")), folder)
    found = read_rows(folder)
    assert len(found) == STEPS, (folder / "output.txt").read_text(encoding="utf-8")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {setting: record(setting, folder / setting) for setting in SETTINGS}
        results["resumed"] = results["resumed"][SAVED_STEP:]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        saved = f"step-{SAVED_STEP:08d}"
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        shutil.copytree(folder / "resumed" / "run" / "checkpoints" / saved, CHECKPOINT / saved)


if __name__ == "__main__":
    main()
