"""The worked examples of the documents: what a page shows, put into a copy of the source, and
commands that run there as its reader would run them.

Commands run in forks of a process that has imported torch, but nothing of megapipe: each imports
the copy that it is to run.
"""

import atexit
import importlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
SOURCE = ("megapipe", "kernels", "models", "tools")
TIMEOUT = 240
PRELOADED = (
    *("numpy", "pydantic", "pytest", "rich.table", "safetensors.torch", "sentencepiece", "tomli_w"),
    *("torch", "torch.distributed.device_mesh", "torch.utils.checkpoint", "triton"),
)

Values = list[tuple[float, float, int]]


def page_text(page: str) -> str:
    """A page of docs/."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page of docs/ that are in one language, in order; "" for those that
    name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page_text(page), re.DOTALL | re.MULTILINE)
    return [block for named, block in fenced if named == language]


def copy_source(folder: Path, source: Path = ROOT, others: Sequence[str] = ()) -> Path:
    """A copy of what is installed, or of such a copy, with `others` beside it; links in it lead to
    its own folders."""
    for part in (*SOURCE, *others):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source / part, folder / part, symlinks=True, ignore=ignored)
    return folder


def apply_diff(source: Path, diff: str) -> set[str]:
    """Apply a diff whose hunks have no line numbers; returns the files that it changes.

    A hunk's old lines must be in its file exactly once.
    """
    changed = set()
    for name, hunks in re.findall(
        r"^--- a/\S+\n\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S
    ):
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


def metrics(run_dir: Path) -> Values:
    """(loss, gradient norm, tokens) of each step that a run has logged."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["grad_norm"], row["tokens"]) for row in rows]


# --- Commands ------------------------------------------------------------------------------------


def run(source: Path, *words: str, status: int = 0) -> str:
    """What `megapipe WORDS` of that source prints; it must end with this status."""
    return _checked(source, ["megapipe", *words], status)


def run_tests(source: Path, *words: str, status: int = 0) -> str:
    """What `pytest WORDS` prints there; it must end with this status."""
    return _checked(source, ["pytest", "-p", "no:cacheprovider", *words], status)


def _checked(source: Path, words: list[str], status: int) -> str:
    output = source / "output.txt"
    ended = _server().run(source, words, output)
    said = output.read_text(encoding="utf-8")
    assert ended == status, said
    return said


class Server:
    """The process from which commands are forked."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self.close)

    def run(self, source: Path, words: list[str], output: Path) -> int:
        """The exit status of a command; `output` is what it prints."""
        server = self._process
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([str(source), words, str(output)]) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], TIMEOUT)[0]:
            self.close()
            raise TimeoutError(f"{words} took {TIMEOUT} s: {output.read_text()}")
        return int(server.stdout.readline())

    def close(self) -> None:
        """End it, with what it runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        _server.cache_clear()


@cache
def _server() -> Server:
    return Server()


def serve() -> None:
    """Answer each command on standard input with its exit status."""
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(*json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(source: str, words: list[str], output: str) -> NoReturn:
    """The life of a fork: the command of that source."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(source)
    sys.path.insert(0, source)
    os.environ["PYTHONPATH"] = source  # of the processes that it starts
    sys.argv = words
    command, *rest = words
    status = 1
    try:
        program = "megapipe.tools.cli" if command == "megapipe" else command
        status = int(importlib.import_module(program).main(rest))
    except SystemExit as ending:
        status = int(ending.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
