"""Where the data stood at each checkpoint of a run: data-record/positions/step-00000100.json.zst.

Checkpoints hold the same and are removed in time; these stay, so that any step can be read again
from the nearest one before it.
"""

import json
import re
from pathlib import Path
from typing import Any

import zstandard

from megapipe.errors import DataError
from megapipe.files import reason, replace_durably, shown, sync_directory

State = dict[str, Any]
FOLDER = "positions"
"""In the directory of what a run keeps of its data."""
NAME = re.compile(r"step-(\d{8,18})\.json\.zst")
LEVEL = 9
"""Of the compression: half the size of level 3, and still faster than the disk."""


def write_position(directory: Path, step: int, state: State) -> Path:
    """Keep the state of a feed behind step `step` of the run in `directory`, in place of an earlier
    one of that step. `state` is of all streams (see merge_states). Raises OSError."""
    path = directory / FOLDER / f"step-{step:08d}.json.zst"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(state, separators=(",", ":")).encode()
    replace_durably(path, [zstandard.compress(content, LEVEL)])
    return path


def begin_positions(directory: Path, step: int, state: State) -> None:
    """Prepare `directory` for a run that goes on behind step `step`, where the feed has `state`.

    Positions behind that step go: the steps in front of them are trained again. That of the step
    itself is replaced: it says which rows are excluded from here on. Raises OSError.
    """
    later = [path for at, path in positions_in(directory).items() if at > step]
    for path in later:
        path.unlink()
    if later:
        sync_directory(directory / FOLDER)
    write_position(directory, step, state)


def positions_in(directory: Path) -> dict[int, Path]:
    """The positions that a run has kept, by their steps in ascending order."""
    folder = directory / FOLDER
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := NAME.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def read_position(path: Path) -> State:
    """What `write_position` has written. Raises DataError where it is damaged."""
    try:
        content = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        state: State = json.loads(content)
    except OSError as error:
        raise DataError(f"{shown(path)}: can't be read: {reason(error)}") from error
    except (ValueError, zstandard.ZstdError) as error:
        raise DataError(
            f"{shown(path)}: is damaged. Restore it from a copy of the run, or remove it: steps "
            "are then read from the position before it."
        ) from error
    return state
