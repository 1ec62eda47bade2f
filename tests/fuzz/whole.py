"""Nothing half-written: what a command has left in the case's folder."""

import json
import os
import re
import signal
from pathlib import Path

from tests.fuzz.case import Ending, Finding

SCRATCH = re.compile(r"^\.tmp|\.tmp(\b|$)|\.partial$|^\..+\.\d+$|~$")
OF_LIBRARIES = re.compile(r"^torchinductor_")
"""Caches that torch keeps in the temporary folder for its next start."""
STEP = re.compile(r"^step-\d{8}$")

RUN_FILES = re.compile(
    r"^(metrics|metrics-replaced)\.jsonl$|^resolved-config\.toml$|^run\.lock$|"
    r"^schedule\.(csv|txt)$|^timeline\.(png|json|txt)$"
)
RUN_FOLDERS = {"checkpoints", "data-record", "wandb", "tensorboard", "tmp"}
"""What a run writes, and may write again, also through a link of that name. Whatever else was there
stays as it was."""

Snapshot = dict[Path, tuple[int, int]]
"""Each path of a folder, with what changes when it is written: (inode, time of the last change)."""


def snapshot(folder: Path) -> Snapshot:
    """All that lies in a folder; links are not followed."""
    found: Snapshot = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            status = path.lstat()
            found[path] = status.st_ino, status.st_mtime_ns
    return found


def check_files(ending: Ending, folder: Path, before: Snapshot) -> list[Finding]:
    """What a command has written, and should not have left like that."""
    after = snapshot(folder)
    written = [path for path in after if after[path] != before.get(path)]
    new = [path for path in written if path not in before]
    problems = []
    if signal.SIGKILL not in ending.sent:
        in_tmp = [
            path
            for path in new
            if path.is_relative_to(folder / "tmp") and not OF_LIBRARIES.match(path.name)
        ]
        scratch = [path for path in new if SCRATCH.search(path.name)]
        problems += [f"left behind: {_name(path, folder)}" for path in {*in_tmp, *scratch}]
    gone = _replaced(ending, folder, before, after)
    problems += [f"replaced or removed: {name}" for name in gone]
    for path in written:
        if path.name == "metrics.jsonl" and path.is_file():
            problems += [f"{_name(path, folder)}: {text}" for text in check_metrics(path)]
    for name in ending.command.outputs:
        path = folder / ending.command.folder / name
        if path in written and path.is_file():
            problems += [f"{name}: {text}" for text in _output_problems(path)]
    return [Finding("whole", text) for text in problems]


def _replaced(ending: Ending, folder: Path, before: Snapshot, after: Snapshot) -> list[str]:
    """Files that were there before the command, and that it had no business with."""
    own = {folder / ending.command.folder / name for name in ending.command.outputs}
    linked = [path.resolve() for path in before if path.name in RUN_FOLDERS and path.is_symlink()]
    return [
        _name(path, folder)
        for path in before
        if after.get(path) != before[path]
        and not path.is_dir()
        and path not in own
        and not RUN_FILES.match(path.name)
        and not RUN_FOLDERS & set(path.relative_to(folder).parts)
        and not any(path.resolve().is_relative_to(target) for target in linked)
    ]


def new_checkpoints(folder: Path, before: Snapshot) -> list[Path]:
    """Directories that look like committed checkpoints, and were not there."""
    return [
        path
        for path in snapshot(folder)
        if STEP.match(path.name)
        and path.parent.name == "checkpoints"
        and path not in before
        and path.is_dir()
        and not path.is_symlink()
    ]


def check_metrics(path: Path) -> list[str]:
    """Whole lines, one for each step, without a gap."""
    data = path.read_bytes()
    if not data:
        return []
    if not data.endswith(b"\n"):
        return ["the last line is cut"]
    try:
        steps = [json.loads(line)["step"] for line in data.splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        return [f"a line can't be read ({error})"]
    if steps != list(range(steps[0], steps[0] + len(steps))):
        return [f"steps are not consecutive: {steps}"]
    return []


def _output_problems(path: Path) -> list[str]:
    """Why a file that a command was asked to write is not whole."""
    data = path.read_bytes()
    if path.suffix == ".png":
        return [] if data.endswith(b"IEND\xaeB`\x82") else ["the picture is cut"]
    if path.suffix == ".json":
        try:
            json.loads(data)
        except ValueError as error:
            return [f"it is not JSON ({error})"]
        return []
    return _model_problems(data)


def _model_problems(data: bytes) -> list[str]:
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor(model_proto=data or b"\0")
    except RuntimeError as error:
        return [f"it is not a tokenizer ({error})"]
    return []


def _name(path: Path, folder: Path) -> str:
    return repr(str(path.relative_to(folder)))
