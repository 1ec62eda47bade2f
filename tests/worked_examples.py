"""The worked examples of the documents: what a page shows, put into a copy of the source, and
commands that run there as its reader would run them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 240

Values = list[tuple[float, float, int]]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page of docs/ that are in one language, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def copy_source(folder: Path, source: Path = ROOT) -> Path:
    """A copy of what is installed, or of such a copy; links in it lead to its own folders."""
    for part in ("megapipe", "kernels", "models", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source / part, folder / part, symlinks=True, ignore=ignored)
    return folder


def apply_diff(source: Path, diff: str) -> set[str]:
    """Apply a diff whose hunks have no line numbers; returns the files that it changes.

    A hunk's old lines must be in its file exactly once.
    """
    changed = set()
    for name, hunks in re.findall(r"^--- a/\S+\n\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S):
        for hunk in hunks.split("@@\n")[1:]:
            lines = hunk.splitlines(keepends=True)
            assert {line[0] for line in lines} <= set(" +-"), hunk
            old = "".join(line[1:] for line in lines if line[0] != "+")
            replace(source / name, old, "".join(line[1:] for line in lines if line[0] != "-"))
        changed.add(name)
    return changed


def replace(file: Path, old: str, new: str) -> None:
    """Put `new` where `old` is, which must be in the file exactly once."""
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{text.count(old)} times in {file}: {old}"
    file.write_text(text.replace(old, new), encoding="utf-8")


def run(source: Path, *words: str, status: int = 0) -> str:
    """What `megapipe WORDS` of that source prints; it must end with this status."""
    done = subprocess.run(
        [sys.executable, "-m", "megapipe", *words],
        cwd=source,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"PYTHONPATH": str(source), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def metrics(run_dir: Path) -> Values:
    """(loss, gradient norm, tokens) of each step that a run has logged."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["grad_norm"], row["tokens"]) for row in rows]
